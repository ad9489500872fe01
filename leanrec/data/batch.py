from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """Rows of a prepared log.

    Attributes:
        features: Field name -> categorical: (B,) int64 ids; multivalued and sequence: (B, L) int64 ids, padded with 0 at the end;
            numeric: (B,) float32, NaN where missing.
        labels: (B,) float32, 0 or 1.
    """

    features: dict[str, Tensor]
    labels: Tensor
