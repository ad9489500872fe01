from leanrec.evaluate.predictions import (
    BUCKETS,
    Comparison,
    Evaluation,
    compare_predictions,
    evaluate_buckets,
    evaluate_predictions,
    popularity_buckets,
)
from leanrec.evaluate.run import evaluate_run

__all__ = [
    "BUCKETS",
    "Comparison",
    "Evaluation",
    "compare_predictions",
    "evaluate_buckets",
    "evaluate_predictions",
    "evaluate_run",
    "popularity_buckets",
]
