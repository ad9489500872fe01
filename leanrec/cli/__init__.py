from leanrec.cli.entry import main, run

__all__ = ["main", "run"]
