"""leanrec makes recommenders many times smaller without losing quality."""

from leanrec.bag import TableBag
from leanrec.budget import fit_budget
from leanrec.compress import compress
from leanrec.embeddings import tables
from leanrec.methods import (
    CAFE,
    CCE,
    DPQ,
    MEC,
    METHODS,
    OPQ,
    PQ,
    ROBE,
    RQ,
    AdaptiveOutput,
    CpRec,
    DropRare,
    Full,
    Hash,
    LowPrecision,
    LowRank,
    Method,
    MixedDim,
    MixedPrecision,
    QuotientRemainder,
    Scalar,
    SmallDim,
    Table,
    TensorTrain,
    parse,
)
from leanrec.move import move_tables
from leanrec.report import Report, report
from leanrec.storage import load, save

__all__ = [
    "CAFE",
    "CCE",
    "DPQ",
    "MEC",
    "METHODS",
    "OPQ",
    "PQ",
    "ROBE",
    "RQ",
    "AdaptiveOutput",
    "CpRec",
    "DropRare",
    "Full",
    "Hash",
    "LowPrecision",
    "LowRank",
    "Method",
    "MixedDim",
    "MixedPrecision",
    "QuotientRemainder",
    "Report",
    "Scalar",
    "SmallDim",
    "Table",
    "TableBag",
    "TensorTrain",
    "compress",
    "fit_budget",
    "load",
    "move_tables",
    "parse",
    "report",
    "save",
    "tables",
]
