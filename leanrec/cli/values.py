"""What stands on the command line -> the values that the public functions take."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

TABLE_SUFFIXES = (".npy", ".safetensors", ".parquet")
CONSTANTS = {"true": True, "false": False, "none": None}


def settings_from(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts as a mapping. A value is a Python literal; a single word needs no quotes.

    Raises:
        typer.BadParameter: A text is no such pair.
    """
    return dict(_setting(text) for text in texts)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"--set {text!r} is not NAME=VALUE, such as embedding_dim=16 or 'hidden_units=[400,400]'.")
    if value.lower() in CONSTANTS:
        return name, CONSTANTS[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        if re.fullmatch(r"[A-Za-z][\w.:-]*", value):
            return name, value
        raise typer.BadParameter(f"--set {text!r}: {value!r} is neither a number, a word nor a list such as [400,400].") from None


def methods_from(texts: Sequence[str]) -> str | dict[str, str | None]:
    """One METHOD, or GLOB=METHOD texts as a mapping in their order, where the method None leaves tables alone.

    Raises:
        typer.BadParameter: Several methods without a pattern.
    """
    # A pattern ends at the first =; a method's own = stand in its parentheses.
    pairs = [re.fullmatch(r"([^=(]+)=(.+)", text.strip()) for text in texts]
    if len(texts) == 1 and pairs[0] is None:
        return texts[0]
    if None in pairs:
        raise typer.BadParameter(
            f"--method {texts[pairs.index(None)]!r}: with several methods, each needs its tables, such as '*.item=PQ()' or '*=None'."
        )
    return {pair[1].strip(): None if pair[2].strip() == "None" else pair[2].strip() for pair in pairs if pair is not None}


def is_table(path: Path) -> bool:
    """Whether a path names a table in a file or folder rather than a run."""
    return path.suffix in TABLE_SUFFIXES or path.is_file() or (path / ".metadata").is_file()


def shape_from(text: str) -> tuple[int, int]:
    """V and D of a text such as 1000000x32.

    Raises:
        typer.BadParameter: It is none.
    """
    match = re.fullmatch(r"([1-9][\d_,]*)[xX*]([1-9]\d*)", text.strip())
    if match is None:
        raise typer.BadParameter(f"--shape {text!r} is not ROWSxDIMENSION, such as 1000000x32.")
    return int(re.sub("[_,]", "", match[1])), int(match[2])
