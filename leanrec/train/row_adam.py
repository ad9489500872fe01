from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RowAdam(torch.optim.Adam):
    """Adam (Kingma and Ba, ICLR 2015) whose step on a sparse gradient touches only the rows that the gradient holds.

    The moments of a row that is not in the batch stay as they are, as in `torch.optim.SparseAdam`; dense gradients take torch's own step,
    so that one optimizer serves a whole model whatever the layout of its gradients.

    A parameter group with `row_adagrad=True` takes Adagrad steps instead (Duchi, Hazan and Singer, JMLR 2011) with one sum of squared gradients
    for each row, of the mean over its numbers (Mudigere et al., ISCA 2022, arXiv 2104.05158): 4 bytes of state per row, where Adam has 8 per number.
    A row is what the first dimension counts; `eps` is added to the root, and `betas` and `weight_decay` mean nothing there.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # training takes no closure
        """One step; gradients that were sparse, or of Adagrad groups, are None afterwards.

        Raises:
            ValueError: The learning rate is so high that a step does not fit in a float32.
        """
        for group in self.param_groups:
            if group["lr"] / (1 - group["betas"][0]) > torch.finfo(torch.float32).max:
                raise ValueError(f"The learning rate {group['lr']:g} gives steps that float32 cannot hold. Lower it; 0.001 is usual.")
            for parameter in group["params"]:
                if parameter.grad is not None and group.get("row_adagrad"):
                    self._step_adagrad(parameter, group)
                    parameter.grad = None
                elif parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
                    parameter.grad = None
        super().step()

    @torch.no_grad()
    def forget(self, parameter: Tensor, rows: Tensor) -> None:
        """Start afresh on some rows of a parameter: their moments or sums become zero."""
        for name in ("exp_avg", "exp_avg_sq", "sum"):
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

    def _step_adagrad(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # torch asks for it when it loads the state of an Adam
            state["sum"] = torch.zeros(len(parameter) if parameter.dim() else 1, dtype=parameter.dtype, device=parameter.device)
        state["step"] += 1
        assert parameter.grad is not None
        if not parameter.grad.is_sparse:
            gradient = parameter.grad.reshape(len(state["sum"]), -1)
            sums = state["sum"].add_(gradient.square().mean(1))
            steps = gradient / sums.sqrt().add_(group["eps"]).unsqueeze(1)
            parameter.add_(steps.view_as(parameter), alpha=-group["lr"])
            return
        gradient = parameter.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        sums = state["sum"].index_select(0, rows).add_(values.flatten(1).square().mean(1))
        state["sum"].index_copy_(0, rows, sums)
        denominator = sums.sqrt().add_(group["eps"]).view(-1, *[1] * (values.dim() - 1))
        parameter.index_add_(0, rows, values / denominator, alpha=-group["lr"])
