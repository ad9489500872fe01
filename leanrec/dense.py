"""Linear layers of any model factored by what they put out: atomic feature mimicking. Yu et al., KDD 2024, arXiv 2405.18146."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from leanrec.budget import Option, spend
from leanrec.embeddings import address, check_changeable, has_hooks, put, tables
from leanrec.ops.spread import Covariance

_CHUNK_VALUES = 2**20


class LowRankLinear(nn.Sequential):
    """Two linear layers in the place of one: (..., in_features) -> (..., rank), without a bias, -> (..., out_features), with one.

    To every tool it is an `nn.Sequential` of two `nn.Linear`; that it has a class of its own tells `report` and `storage` what it replaced.
    """

    in_features: int
    rank: int
    out_features: int
    had_bias: bool  # of the layer that it replaced

    @classmethod
    def empty(cls, layer: nn.Linear | LowRankLinear, rank: int, **placement: Any) -> LowRankLinear:
        """Layers of uninitialized values for the place of `layer`; `placement` is `device` and `dtype`, as of any torch module.

        Each parameter requires a gradient where the one in its place did; a bias that the layer did not have goes by its weight.
        """
        first = skip_init(nn.Linear, layer.in_features, rank, bias=False, **placement)
        made = cls(first, skip_init(nn.Linear, rank, layer.out_features, **placement))
        made.in_features, made.rank, made.out_features = layer.in_features, rank, layer.out_features
        made.had_bias = layer.had_bias if isinstance(layer, LowRankLinear) else layer.bias is not None
        old = layer.parameters() if isinstance(layer, LowRankLinear) else (layer.weight, layer.weight, layer.bias if made.had_bias else layer.weight)
        for parameter, replaced in zip(made.parameters(), old, strict=True):
            parameter.requires_grad_(replaced.requires_grad)
        return made.train(layer.training)

    @property
    def nbytes(self) -> int:
        """Bytes of both layers."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def nbytes_full(self) -> int:
        """Bytes of the layer that it replaced, as float32."""
        return (self.in_features + self.had_bias) * self.out_features * 4


@dataclass(frozen=True)
class _Outputs:
    """Of a layer's outputs: their mean (out,), the variances along their principal axes (out,), falling, and the axes (out, out) as columns."""

    mean: Tensor
    variances: Tensor
    axes: Tensor


def compress_dense(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int | None = None,
    ratio: float | None = None,
    layers: str | Sequence[str] = "*",
) -> nn.Module:
    """The model with its linear layers factored into two of low rank each, in place.

    The model is run once over `batches`. For a layer y = W x + b whose outputs there have the mean m and the principal axes U, r of them,
    U U^T (W x + b) + (I - U U^T) m is the nearest to y of all affine functions of rank r. It is put into the layer's place as
    x -> (U^T W) x and z -> U z + U U^T b + (I - U U^T) m: the paper's two biases are merged into the second, which changes nothing but the
    bytes. Layers that would not become smaller are left alone. Device, dtype, training mode and `requires_grad` stay as they were; an
    optimizer over the old parameters has to be made anew. A short fine-tuning afterwards is part of the paper's method.

    Args:
        model: Any module; also an `nn.Linear` itself. Layers inside of compressed tables, layers that are factored already, and layers that
            torch reads without calling them, in `nn.MultiheadAttention` and `nn.TransformerEncoderLayer`, do not count.
        batches: What the model is called with, one after the other: a tuple as `model(*batch)`, all else as `model(batch)`.
        rank: Rank of every layer that it makes smaller; or
        ratio: bytes of all matching layers before / after, at least. The ranks are then chosen such that the shares of variance that the
            layers lose are small in sum; a layer may also stay as it is.
        layers: Glob on the paths of the `nn.Linear` modules, or several of which one has to match.

    Returns:
        The same model; where the model is a linear layer itself, its replacement.

    Raises:
        ValueError: Neither or both of rank and ratio, a pattern that matches no layer, a rank or ratio out of range, or a layer that cannot
            be replaced: it shares a parameter, has hooks, has no values (on the meta device), is not called on the batches or puts out
            values that are not finite. The model is then as it was.
    """
    if (rank is None) == (ratio is None):
        raise ValueError(f"Give one of rank and ratio, not rank={rank} and ratio={ratio}.")
    matching, candidates = _choose(model, layers, rank=rank, ratio=ratio)
    outputs = _run(model, candidates, batches)
    ranks: Mapping[str, int | None] = dict.fromkeys(candidates, rank) if ratio is None else _fit_ranks(matching, candidates, outputs, ratio)
    return put(model, {path: _factored(candidates[path], outputs[path], chosen) for path, chosen in ranks.items() if chosen is not None})


def check_dense_ratio(model: nn.Module, ratio: float) -> None:
    """Raise the ValueError that `compress_dense` would for this ratio of all linear layers, before any work is done."""
    _choose(model, "*", rank=None, ratio=ratio)


def factored_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The layers that `compress_dense` made: path -> module."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LowRankLinear)}


def _choose(
    model: nn.Module, layers: str | Sequence[str], *, rank: int | None, ratio: float | None
) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
    """Path -> linear layer, of all that match and of those among them that can be factored; raises what is wrong with the request."""
    check_changeable(model)
    if rank is not None and type(rank) is not int:
        raise ValueError(f"rank={rank!r} must be an integer.")
    matching = _matching(model, [layers] if isinstance(layers, str) else layers)
    candidates = _candidates(matching, 1 if rank is None else rank)
    _check(model, candidates)
    if ratio is not None:
        _check_ratio(matching, candidates, ratio)
    return matching, candidates


def _matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """Path -> linear layer, where a pattern matches."""
    if not patterns:
        raise ValueError("layers=[] names no layer. Give globs on their paths, or leave it out for all.")
    closed = [*tables(model).values(), *factored_layers(model).values()]
    inside = {part for module in closed for part in module.modules()}
    # A subclass may be used otherwise than by a call, as the output layer of nn.MultiheadAttention is.
    linear = {path: module for path, module in model.named_modules() if type(module) is nn.Linear and module not in inside}
    read = {part for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer) for part in module.children()}
    found = {path: layer for path, layer in linear.items() if layer not in read}
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in found):
            if path := next((path for path in linear if fnmatchcase(path, pattern)), None):
                reason = "nn.TransformerEncoderLayer reads its weight without calling it, so it cannot be factored"
                raise ValueError(f"Layer {_title(path, linear[path])}: {reason}. Name other layers.")
            known = ", ".join(_title(path, layer) for path, layer in found.items()) or "none"
            raise ValueError(f"No layer matches the pattern {pattern!r}. The layers of class nn.Linear are: {known}.")
    return {path: layer for path, layer in found.items() if any(fnmatchcase(path, pattern) for pattern in patterns)}


def _candidates(layers: Mapping[str, nn.Linear], rank: int) -> dict[str, nn.Linear]:
    """The layers that are smaller at this rank."""
    highest = max(_highest_rank(layer) for layer in layers.values())
    if highest < 1:
        raise ValueError(f"No rank makes a layer smaller: {', '.join(_title(path, layer) for path, layer in layers.items())}. Choose wider ones.")
    if not 1 <= rank <= highest:
        raise ValueError(f"rank={rank} makes no layer smaller. Choose 1 to {highest}.")
    return {path: layer for path, layer in layers.items() if rank <= _highest_rank(layer)}


def _check(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Raise ValueError for the first layer that cannot be replaced."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(address(parameter), []).append(name)
    for path, layer in layers.items():
        hint = f"or leave the layer out: name the others in layers=[...], without {path!r}"
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(f"Layer {_title(path, layer)}: it is on the meta device and holds no values. Load its weights first, {hint}.")
        for name, parameter in layer.named_parameters():
            if others := set(owners[address(parameter)]) - {f"{path}.{name}".lstrip(".")}:
                raise ValueError(f"Layer {_title(path, layer)}: its {name} is also the parameter {min(others)!r}. Untie them, {hint}.")
        if has_hooks(layer) or "forward" in vars(layer):
            raise ValueError(f"Layer {_title(path, layer)}: it has hooks or a forward of its own, which would be lost. Remove them, {hint}.")


def _check_ratio(matching: Mapping[str, nn.Linear], candidates: Mapping[str, nn.Linear], ratio: float) -> None:
    full = sum(_nbytes(layer) for layer in matching.values())
    smallest = sum(_nbytes(layer, 1 if path in candidates else None) for path, layer in matching.items())
    if not 1 < ratio <= full / smallest:
        raise ValueError(
            f"ratio={ratio} cannot be met: the {len(matching)} layers have {full} bytes, and {smallest} with a rank of 1. "
            f"Choose more than 1, and at most {math.floor(full / smallest * 100) / 100}."
        )


@torch.no_grad()
def _run(model: nn.Module, layers: Mapping[str, nn.Linear], batches: Iterable[Any]) -> dict[str, _Outputs]:
    """What the layers put out while the model, in evaluation mode, runs over the batches."""
    sums = {path: Covariance() for path in layers}
    hooks = [layer.register_forward_hook(partial(_add, sums[path])) for path, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for batch in batches:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return {path: _outputs(path, layer, sums[path]) for path, layer in layers.items()}


def _add(sums: Covariance, layer: nn.Module, inputs: Any, output: Tensor) -> None:
    for rows in output.reshape(-1, output.shape[-1]).split(max(1, _CHUNK_VALUES // output.shape[-1])):
        sums.add(rows.double())


def _outputs(path: str, layer: nn.Linear, sums: Covariance) -> _Outputs:
    if not sums.total:
        raise ValueError(f"Layer {_title(path, layer)}: it was given no rows while the model ran on the batches. Give others, or name other layers.")
    mean, covariance = sums.value()
    if not covariance.isfinite().all():
        raise ValueError(f"Layer {_title(path, layer)}: it puts out values on the batches that are not finite. Repair the model or the batches.")
    variances, axes = torch.linalg.eigh(covariance)  # rising
    return _Outputs(mean, variances.clamp(min=0).flip(0), axes.flip(1))


def _fit_ranks(
    matching: Mapping[str, nn.Linear], candidates: Mapping[str, nn.Linear], outputs: Mapping[str, _Outputs], ratio: float
) -> dict[str, int | None]:
    """Rank of each candidate, None to leave it as it is, with which all matching layers meet the ratio."""
    others = sum(_nbytes(layer) for path, layer in matching.items() if path not in candidates)
    budget = math.floor(sum(_nbytes(layer) for layer in matching.values()) / ratio) - others
    options = [_options(layer, outputs[path].variances) for path, layer in candidates.items()]
    picks = [choices.index(pick) + 1 for choices, pick in zip(options, spend(options, budget), strict=True)]
    return {path: None if pick > _highest_rank(layer) else pick for (path, layer), pick in zip(candidates.items(), picks, strict=True)}


def _options(layer: nn.Linear, variances: Tensor) -> list[Option]:
    """Bytes of a layer and share of its variance that it loses at ranks from 1 on, and last when it is left alone."""
    shares = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    lost = (1 - shares).clamp(min=0).round(decimals=9).tolist()  # what rounding of the outputs leaves is not worth a byte
    ranks = range(1, _highest_rank(layer) + 1)
    return [*(Option(None, _nbytes(layer, rank), lost[rank - 1]) for rank in ranks), Option(None, _nbytes(layer), 0.0)]


@torch.no_grad()
def _factored(layer: nn.Linear, outputs: _Outputs, rank: int) -> LowRankLinear:
    """The nearest layer of this rank, calculated in float64."""
    axes, mean, weight = outputs.axes[:, :rank], outputs.mean, layer.weight.double()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    made = LowRankLinear.empty(layer, rank, device=layer.weight.device, dtype=layer.weight.dtype)
    values = (axes.T @ weight, axes, mean + axes @ (axes.T @ (bias - mean)))
    for parameter, value in zip(made.parameters(), values, strict=True):
        parameter.copy_(value)
    return made


def _nbytes(layer: nn.Linear, rank: int | None = None) -> int:
    """Bytes of a layer, as it is or at a rank."""
    num_biases = layer.out_features if rank is not None or layer.bias is not None else 0
    num_weights = layer.weight.numel() if rank is None else rank * (layer.in_features + layer.out_features)
    return (num_weights + num_biases) * layer.weight.element_size()


def _highest_rank(layer: nn.Linear) -> int:
    """The highest rank at which a layer is smaller than as it is; 0 where there is none."""
    num_values = layer.weight.numel() - (layer.out_features if layer.bias is None else 0)
    return max(0, (num_values - 1) // (layer.in_features + layer.out_features))


def _title(path: str, layer: nn.Linear) -> str:
    return f"{path!r} ({layer.in_features} -> {layer.out_features})"
