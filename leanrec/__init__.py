"""leanrec makes recommenders many times smaller without losing quality."""

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
