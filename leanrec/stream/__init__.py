from leanrec.stream.run import compress_table

__all__ = ["compress_table"]
