from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from leanrec import runs
from leanrec.data.loader import Loader
from leanrec.methods.base import Table
from leanrec.ops.intervals import delong_difference
from leanrec.ops.metrics import auc, log_loss
from leanrec.recommender import predict
from leanrec.train.row_adam import RowAdam
from leanrec.train.settings import TrainSettings

PARTS = ({"table_share": 1.0}, {"share": 0.5}, {"share": 0.25})
"""How much of the way from the best weights is tried where all of it was too much: that of the tables alone, then less of all weights."""

CHANCE = 0.001
"""Of keeping a tuning that gains nothing. A look at the validation rows has its part of it (Bonferroni): the best of many is above 0 by chance.

A strict level, for rows of one user or query are not independent, and the same rows have told when to stop the training before.
"""

MOST_LOG_LOSS = 1.001
"""How many times the log loss before tuning the one after it may be, for a higher AUC."""


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        best_step: Step after which the AUC was best; 0 where that was before the first.
        history: One entry per evaluation: epoch, step, loss, auc, logloss; if the weights before the first step are a candidate, `gain_error`, the
            standard error of what the AUC is above theirs; `share` or `table_share`, if part of the way is kept.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_auc: float = float("-inf")
    best_step: int = 0
    failures: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class State:
    """Everything that decides how training goes on, and its file."""

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.model, self.settings, self.progress = model, settings, Progress()
        self.optimizer = RowAdam(_parameter_groups(model, settings))
        self.best: dict[str, Tensor] = {}
        self.first_logits = torch.empty(0)
        looks = settings.epochs * settings.evaluations_per_epoch * (1 + len(PARTS))
        self.least_gain = -NormalDist().inv_cdf(CHANCE / looks)  # in standard errors

    def evaluate(self, validation: Loader) -> None:
        """Take the validation AUC; remember the weights if it is the best so far, and a gain of tuning neither chance nor paid for with the log loss.

        Where tuning went too far, parts of the way from the best weights so far are tried as well: that of the tables alone, for the rest of the
        model over-fits first, and less of all of it, for weights of one model before and after a fine-tuning mix well (Wortsman et al., Robust
        fine-tuning of zero-shot models, CVPR 2022). Training goes on from where it was.
        """
        progress = self.progress
        loss = progress.loss_sum / max(progress.loss_steps, 1)
        entry = {"epoch": progress.epoch, "step": progress.step, "loss": loss, **self._quality(validation)}
        progress.loss_sum, progress.loss_steps = 0.0, 0
        is_kept = self._keep_if_best(entry)
        if not is_kept and self.settings.keep_initial:
            is_kept = self._keep_if_best_on_the_way(entry, validation)
        progress.history.append(entry)
        if not is_kept:
            progress.failures += 1
            for group in self.optimizer.param_groups:
                group["lr"] *= self.settings.learning_rate_decay

    def _quality(self, validation: Loader) -> dict[str, float]:
        labels, logits = predict(self.model, validation)
        quality = {"auc": auc(labels, logits), "logloss": log_loss(labels, logits)}
        if not self.settings.keep_initial:
            return quality
        if not self.progress.history:
            self.first_logits = logits
            return quality
        return {**quality, "gain_error": delong_difference(labels, logits, self.first_logits).standard_error}

    def _keep_if_best(self, entry: Mapping[str, float]) -> bool:
        progress = self.progress
        if entry["auc"] <= progress.best_auc or not self._is_gain(entry):
            return False
        progress.best_auc, progress.best_step, progress.failures = entry["auc"], progress.step, 0
        self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return True

    def _is_gain(self, entry: Mapping[str, float]) -> bool:
        """Whether an AUC above that before the first step, where that was a candidate, is more than chance and not paid for with the log loss."""
        if not (self.settings.keep_initial and self.progress.history):
            return True
        first = self.progress.history[0]
        is_chance = entry["auc"] - first["auc"] <= self.least_gain * entry["gain_error"]
        return not is_chance and entry["logloss"] <= MOST_LOG_LOSS * first["logloss"]

    @torch.no_grad()
    def _keep_if_best_on_the_way(self, entry: dict[str, float], validation: Loader) -> bool:
        """Try weights between the best and the present ones; write what is kept into `entry`, with its part of the way."""
        present = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        of_tables = {f"{path}.{name}" for path, table in _tables(self.model).items() for name in table.state_dict()}
        is_kept = False
        for part in PARTS:
            for name, tensor in self.model.state_dict().items():
                if not torch.equal(self.best[name], present[name]) and tensor.is_floating_point():
                    share = part.get("share", float(name in of_tables))
                    tensor.copy_(torch.lerp(self.best[name], present[name], share))
            mixed = {**entry, **self._quality(validation), **part}
            if is_kept := self._keep_if_best(mixed):
                entry.update(mixed)
                break
        self.model.load_state_dict(present)
        return is_kept

    def save(self, path: Path) -> None:
        """Write the checkpoint: at once and whole, no pickle."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"optimizer/{index}/{key}": value for index, values in optimizer["state"].items() for key, value in values.items()}
        tensors["random"] = torch.get_rng_state()
        if self.settings.keep_initial:
            tensors["first_logits"] = self.first_logits
        rates = [group["lr"] for group in self.optimizer.param_groups]
        temporary = path.with_name(path.name + ".tmp")
        save_file(_unshared(tensors), temporary, metadata={"progress": json.dumps(asdict(self.progress)), "rates": json.dumps(rates)})
        runs.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: The file was not written by `save`, by another version of it or for another model, or is damaged.
        """
        try:
            self._load(path)
        except (SafetensorError, LookupError, TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: not a checkpoint that this run can go on from ({reason}). Delete it, and the training starts over.") from None

    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        self.progress = Progress(**json.loads(metadata["progress"]))
        self.model.load_state_dict({name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")})
        self.best = {name.removeprefix("best/"): tensor for name, tensor in tensors.items() if name.startswith("best/")}
        optimizer: dict[str, Any] = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                optimizer["state"].setdefault(int(index), {})[key] = tensor
        for group, rate in zip(optimizer["param_groups"], json.loads(metadata["rates"]), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(optimizer)
        if self.settings.keep_initial:
            self.first_logits = tensors["first_logits"]
        torch.set_rng_state(tensors["random"])


def _tables(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag | Table)}


def _parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameters of embedding tables, and all others, each with its learning rate and rule."""
    in_tables = {parameter for table in _tables(model).values() for parameter in table.parameters()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter not in in_tables], "lr": settings.learning_rate},
        {
            "params": [parameter for parameter in parameters if parameter in in_tables],
            "lr": settings.table_learning_rate or settings.learning_rate,
            "row_adagrad": settings.table_optimizer == "adagrad",
        },
    ]
    return [group for group in groups if group["params"]]


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, those that share memory with an earlier one copied: the file format stores each name by itself."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = (tensor.clone() if tensor.data_ptr() in seen else tensor).contiguous()
        seen.add(tensor.data_ptr())
    return own
