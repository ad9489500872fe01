"""The way in: one command is parsed and run, and whatever goes wrong becomes one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, cast

import typer

from leanrec.cli.commands import app

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
RESUMING = ("train", "compress", "bench", "demo")
EXTRAS = {"matplotlib": "plot"}

# The class of all mistakes on a command line is click's, which newer versions of Typer carry inside: its subclass is the way to it in all of them.
UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def main() -> NoReturn:
    """What `leanrec` on the command line calls."""
    sys.path.append(os.getcwd())  # a model of the user's own is found where the command is given
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command: 0, 1 (failed), 2 (wrong usage) or 130 (interrupted). A failure is one line on stderr."""
    try:
        return _invoke(arguments)
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else "leanrec"
        return _fail(f"{error.format_message().rstrip('.')}. See {command} --help.", WRONG_USAGE)
    except KeyboardInterrupt:
        return _fail(f"interrupted. The same command {'goes on where it stopped' if arguments[0] in RESUMING else 'starts over'}.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read the output has gone: what is left of it has nowhere to go
        return FAILED
    except ModuleNotFoundError as error:
        return _fail(_missing_module(error), FAILED)
    except OSError as error:
        return _fail(_system_message(error), FAILED)
    except ValueError as error:
        return _fail(str(error), FAILED)
    except MemoryError:
        return _fail("out of memory. Close other programs, or take smaller batches.", FAILED)
    except _engine_errors() as error:
        return _fail(_system_message(OSError(str(error))), FAILED)


def _invoke(arguments: Sequence[str]) -> int:
    try:
        with typer.main.get_command(app).make_context("leanrec", list(arguments)) as context:
            context.command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    sys.stdout.flush()
    return 0


def _fail(message: str, code: int) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _missing_module(error: ModuleNotFoundError) -> str:
    extra = EXTRAS.get(str(error.name).partition(".")[0])
    return (
        f"{error}. Install it with: pip install 'leanrec[{extra}]'" if extra else f"{error}. Install it, or give the command where it can be found."
    )


def _system_message(error: OSError) -> str:
    """What the operating system refused, on which file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or _tells_full_disk(str(error)):
        place = f" ({error.filename})" if error.filename is not None else ""
        return f"the disk is full{place}. Free some space and give the same command again."
    return f"{error.filename}: {error.strerror}." if error.filename is not None else str(error)


def _tells_full_disk(text: str) -> bool:
    return "No space left" in text or "StorageFull" in text


def _engine_errors() -> tuple[type[BaseException], ...]:
    """Errors that the engines under the library keep for themselves. They are imported only when something has gone wrong."""
    from polars.exceptions import PolarsError
    from pyarrow import ArrowException
    from safetensors import SafetensorError

    return PolarsError, ArrowException, SafetensorError
