"""The compression methods: the only list of them there is, and their text form."""

from __future__ import annotations

import ast
from dataclasses import Field, fields
from typing import Any

from leanrec.methods.base import Method, Table
from leanrec.methods.cafe import CAFE
from leanrec.methods.cce import CCE
from leanrec.methods.cprec import AdaptiveOutput, CpRec
from leanrec.methods.deep_hash import DeepHash
from leanrec.methods.dpq import DPQ
from leanrec.methods.droprare import DropRare
from leanrec.methods.full import Full
from leanrec.methods.hash import Hash
from leanrec.methods.lma import LMA
from leanrec.methods.lowprecision import LowPrecision
from leanrec.methods.lowrank import LowRank
from leanrec.methods.mec import MEC
from leanrec.methods.mgqe import MGQE
from leanrec.methods.mixeddim import MixedDim
from leanrec.methods.mixedprecision import MixedPrecision
from leanrec.methods.opq import OPQ
from leanrec.methods.pq import PQ
from leanrec.methods.pruned import Pruned
from leanrec.methods.quotient_remainder import QuotientRemainder
from leanrec.methods.robe import ROBE
from leanrec.methods.rq import RQ
from leanrec.methods.scalar import Scalar
from leanrec.methods.smalldim import SmallDim
from leanrec.methods.tensor_train import TensorTrain
from leanrec.methods.vrq import VRQ

__all__ = [
    "CAFE",
    "CCE",
    "DPQ",
    "LMA",
    "MEC",
    "METHODS",
    "MGQE",
    "OPQ",
    "PQ",
    "ROBE",
    "RQ",
    "VRQ",
    "AdaptiveOutput",
    "CpRec",
    "DeepHash",
    "DropRare",
    "Full",
    "Hash",
    "LowPrecision",
    "LowRank",
    "Method",
    "MixedDim",
    "MixedPrecision",
    "Pruned",
    "QuotientRemainder",
    "Scalar",
    "SmallDim",
    "Table",
    "TensorTrain",
    "parse",
]

METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        Full,
        Scalar,
        PQ,
        OPQ,
        DPQ,
        MGQE,
        RQ,
        VRQ,
        MEC,
        LowRank,
        Hash,
        QuotientRemainder,
        DropRare,
        ROBE,
        LMA,
        CAFE,
        CpRec,
        MixedDim,
        SmallDim,
        MixedPrecision,
        TensorTrain,
        CCE,
        LowPrecision,
        Pruned,
        DeepHash,
    )
}

_MAX_CHARACTERS = 1000
_HOW_TO_WRITE = "Write a name, with named arguments if any: PQ or PQ(num_subspaces=4, num_centroids=256)."


def parse(text: str) -> Method:
    """The method that a text such as `PQ`, `PQ()` or `PQ(num_subspaces=4)` names: the inverse of its repr.

    Only literals are read; nothing is evaluated.

    Raises:
        ValueError: No such method, no such argument, or no literal; the message lists what there is.
    """
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"cannot read a text of {len(text)} characters as a method; {_MAX_CHARACTERS} are the most. {_HOW_TO_WRITE}")
    try:
        name, settings = _read(text)
    except (TypeError, OverflowError, MemoryError, RecursionError):  # what Python's parser and literals answer to odd or deeply nested text
        raise ValueError(f"cannot read {text!r} as a method. {_HOW_TO_WRITE}") from None
    return METHODS[name](**settings)


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """Name of a method and the values of its arguments."""
    name, arguments = _split_call(text)
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}. Choose one of {list(METHODS)}.")
    known = {field.name: field for field in fields(METHODS[name])}
    settings: dict[str, Any] = {}
    for argument in arguments:
        if argument.arg not in known or argument.arg in settings:
            fault = "an unknown argument" if argument.arg not in known else "twice the argument"
            raise ValueError(f"{text!r} has {fault} {argument.arg!r}. {name} takes each of {list(known)} at most once.")
        settings[argument.arg] = _read_value(known[argument.arg], argument.value)
    return name, settings


def _split_call(text: str) -> tuple[str, list[ast.keyword]]:
    """Name and named arguments of `Name` or `Name(argument=literal, ...)`."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        node = None
    if isinstance(node, ast.Name):
        return node.id, []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        return node.func.id, node.keywords
    raise ValueError(f"cannot read {text!r} as a method. {_HOW_TO_WRITE}")


def _read_value(field: Field[Any], node: ast.expr) -> Any:
    """The literal of an argument, of the type of the field's default."""
    expected = type(field.default)
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"{field.name}={ast.unparse(node)} is not a literal. Write a plain {expected.__name__}, such as {field.default!r}."
        ) from None
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ValueError(f"{field.name}={value!r} is not of the right type. Write a plain {expected.__name__}, such as {field.default!r}.")
    return value
