from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Adam):
    """Adam (Kingma and Ba, ICLR 2015) whose step on a sparse gradient touches only the rows that the gradient holds.

    The moments of a row that is not in the batch stay as they are, as in `torch.optim.SparseAdam`; dense gradients take torch's own step,
    so that one optimizer serves a whole model whatever the layout of its gradients.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # training takes no closure
        """One step; gradients that were sparse are None afterwards."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
                    parameter.grad = None
        super().step()

    @torch.no_grad()
    def forget(self, parameter: Tensor, rows: Tensor) -> None:
        """Start afresh on some rows of a parameter: their moments become zero."""
        for name in ("exp_avg", "exp_avg_sq"):
            if name in self.state[parameter]:
                self.state[parameter][name][rows] = 0.0

    def _step_rows(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        exp_avg = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, exp_avg)
        state["exp_avg_sq"].index_copy_(0, rows, exp_avg_sq)
        denominator = exp_avg_sq.div_(1 - beta2**step).sqrt_().add_(group["eps"])
        parameter.index_add_(0, rows, exp_avg.div_(denominator), alpha=-group["lr"] / (1 - beta1**step))
