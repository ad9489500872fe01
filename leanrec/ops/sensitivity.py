"""How much a model's loss depends on the rows of a table, to second order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 0.01  # of the mean eigenvalue: directions that the log never tried are not free of charge


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Fisher information of a table, one number per row and one metric for all of them.

    An error e_i in each row i raises the mean loss of a row of the log by about sum_i rows_i e_i^T M e_i / 2, M being `metric` over its trace.

    Attributes:
        rows: (V,) float32, share of each row in the trace of the Fisher information.
        metric: (D, D) float64, symmetric: Fisher information of a shift of all rows together.
    """

    rows: Tensor
    metric: Tensor

    def whitener(self) -> tuple[Tensor, Tensor]:
        """A and its inverse, (D, D) float32 each: e^T M e = |e A|^2, for rows e, up to a small floor under the eigenvalues of M."""
        values, axes = torch.linalg.eigh(self.metric)
        shares = values.clamp(min=0) / values.clamp(min=0).sum().clamp(min=torch.finfo(torch.float64).tiny)
        roots = (shares + _FLOOR / len(values)).sqrt()
        return (axes * roots).float(), (axes / roots).T.contiguous().float()
