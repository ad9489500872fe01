"""leanrec makes recommenders many times smaller without losing quality."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leanrec.bag import TableBag
    from leanrec.budget import fit_budget
    from leanrec.compress import compress
    from leanrec.dense import compress_dense
    from leanrec.embeddings import tables
    from leanrec.merge import merge
    from leanrec.methods import (
        CAFE,
        CCE,
        DPQ,
        LMA,
        MEC,
        METHODS,
        MGQE,
        OPQ,
        PQ,
        ROBE,
        RQ,
        VRQ,
        AdaptiveOutput,
        CpRec,
        DeepHash,
        DropRare,
        Full,
        Hash,
        LowPrecision,
        LowRank,
        Method,
        MixedDim,
        MixedPrecision,
        Pruned,
        QuotientRemainder,
        Scalar,
        SmallDim,
        Table,
        TensorTrain,
        parse,
    )
    from leanrec.move import move_tables
    from leanrec.report import Report, report
    from leanrec.sensitivity import measure_sensitivity
    from leanrec.storage import load, save
    from leanrec.stream import compress_table

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
    "Report",
    "Scalar",
    "SmallDim",
    "Table",
    "TableBag",
    "TensorTrain",
    "compress",
    "compress_dense",
    "compress_table",
    "fit_budget",
    "load",
    "measure_sensitivity",
    "merge",
    "move_tables",
    "parse",
    "report",
    "save",
    "tables",
]

_HOMES = {
    "Report": "report",
    "TableBag": "bag",
    "compress": "compress",
    "compress_dense": "dense",
    "compress_table": "stream",
    "fit_budget": "budget",
    "load": "storage",
    "measure_sensitivity": "sensitivity",
    "merge": "merge",
    "move_tables": "move",
    "report": "report",
    "save": "storage",
    "tables": "embeddings",
}
"""Name -> the room that it comes from, where that is not `methods`."""


class _Package(ModuleType):
    """Names and rooms are imported when they are first asked for: the command line answers help and mistakes at once, not after torch."""

    def __getattr__(self, name: str) -> Any:
        if name in __all__:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'methods')}"), name)
            setattr(self, name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever imports the room `compress` would set it here: `leanrec.compress` is the function of that name.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return list(__all__)


sys.modules[__name__].__class__ = _Package
