"""Reference recommenders, all on logits, and the way in for a user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from leanrec.data.schema import Schema
from leanrec.models.dcnv2 import DCNv2
from leanrec.models.deepfm import DeepFM
from leanrec.models.din import DIN
from leanrec.models.fibinet import FiBiNET
from leanrec.models.fm import FM
from leanrec.models.gdcn import GDCNP
from leanrec.models.ipnn import IPNN
from leanrec.models.lr import LR

MODELS: dict[str, type[nn.Module]] = {
    "lr": LR,
    "fm": FM,
    "deepfm": DeepFM,
    "dcnv2": DCNv2,
    "ipnn": IPNN,
    "gdcnp": GDCNP,
    "fibinet": FiBiNET,
    "din": DIN,
}


def build(name: str, schema: Schema, **settings: Any) -> nn.Module:
    """An untrained model. Its initial values come from torch's random state, as those of every `nn.Module`: seed that for a repeatable one.

    Args:
        name: A key of `MODELS`, or `package.module:function` for a model of your own, which is called as `function(schema, **settings)`.
        schema: The fields of the prepared log.
        settings: Literals, as the model's `__init__` or the function names them.

    Returns:
        A module with forward(features) -> logits (B,); for `features` see `leanrec.data.batch.Batch`.

    Raises:
        ValueError: An unknown name, module, function or setting, or a setting out of range.
    """
    maker = _imported(name) if ":" in name else _known(name)
    _check_settings(name, maker, settings)
    model = maker(schema, **settings)
    if not isinstance(model, nn.Module):
        raise ValueError(f"Model {name!r} returned {type(model).__name__}, but it must return a torch.nn.Module.")
    return model


def _known(name: str) -> Callable[..., object]:
    if name not in MODELS:
        raise ValueError(f"Model {name!r} is unknown. Choose one of {list(MODELS)}, or package.module:function for your own.")
    return MODELS[name]


def _imported(name: str) -> Callable[..., object]:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name or module_name.startswith("."):
        raise ValueError(f"Model {name!r} is no name of a function. Write package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something it imports is not: the user needs that trace
        raise ValueError(f"Model {name!r}: there is no module {error.name!r}. Is its folder on the Python path?") from None
    maker = getattr(module, function_name, None)
    if not callable(maker):
        raise ValueError(f"Model {name!r}: module {module_name!r} has no function {function_name!r}.")
    return maker


def _check_settings(name: str, maker: Callable[..., object], settings: dict[str, Any]) -> None:
    parameters = list(inspect.signature(maker).parameters.values())[1:]  # the first is the schema
    named = [parameter for parameter in parameters if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    valid = [parameter.name for parameter in named]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_any and (unknown := sorted(set(settings) - set(valid))):
        raise ValueError(f"Model {name!r} has no setting {unknown[0]!r}. Choose from {valid}.")
    if missing := [parameter.name for parameter in named if parameter.default is parameter.empty and parameter.name not in settings]:
        raise ValueError(f"Model {name!r} needs the setting {missing[0]!r}, which has no default.")
