"""Reference recommenders, all on logits, and the way in for a user's own."""

from __future__ import annotations

import importlib
import inspect
import traceback
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


def build(name: str, schema: Schema, /, **settings: Any) -> nn.Module:
    """An untrained model. Its initial values come from torch's random state, as those of every `nn.Module`: seed that for a repeatable one.

    Args:
        name: A key of `MODELS`, or `package.module:function` for a model of your own, which is called as `function(schema, **settings)`.
        schema: The fields of the prepared log.
        settings: Literals, as the model's `__init__` or the function names them.

    Returns:
        A module with forward(features) -> logits (B,); for `features` see `leanrec.data.batch.Batch`.

    Raises:
        ValueError: An unknown name, module, function or setting, a setting out of range, or a model of your own that fails to be imported or made.
    """
    maker = _imported(name) if ":" in name else _known(name)
    _check_settings(name, maker, settings)
    try:
        model = maker(schema, **settings)
    except (Exception, SystemExit) as error:
        if name in MODELS or isinstance(error, MemoryError | ModuleNotFoundError):
            raise
        raise ValueError(f"Model {name!r} cannot be made from the schema: {_what_and_where(error)}.") from error
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
    except (Exception, SystemExit) as error:
        raise ValueError(f"Model {name!r}: module {module_name!r} cannot be imported: {_what_and_where(error)}.") from error
    maker = getattr(module, function_name, None)
    if not callable(maker):
        raise ValueError(f"Model {name!r}: module {module_name!r} has no function {function_name!r}.")
    return maker


def _check_settings(name: str, maker: Callable[..., object], settings: dict[str, Any]) -> None:
    if not (takes := _parameters(maker)) or takes[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise ValueError(f"Model {name!r} must take the schema as its first argument, such as def build(schema, embedding_dim=16).")
    first, *parameters = takes
    named = [parameter for parameter in parameters if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    valid = [parameter.name for parameter in named]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if unknown := sorted(set(settings) & {first.name} if takes_any else set(settings) - set(valid)):
        raise ValueError(f"Model {name!r} has no setting {unknown[0]!r}. Choose from {valid}.")
    if missing := [parameter.name for parameter in named if parameter.default is parameter.empty and parameter.name not in settings]:
        raise ValueError(f"Model {name!r} needs the setting {missing[0]!r}, which has no default.")


def _parameters(maker: Callable[..., object]) -> list[inspect.Parameter]:
    """What a callable takes; of some that are written in C, Python cannot tell."""
    try:
        return list(inspect.signature(maker).parameters.values())
    except (ValueError, TypeError):
        return []


def _what_and_where(error: BaseException) -> str:
    """An error of a user's module in a line, with the last place in the file where it came up; a syntax error tells the place itself."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(file, line) for file, line in frames if file != __file__ and "importlib" not in file]
    places = [f" ({file}, line {line})" for file, line in own if file == own[0][0]]
    return f"{type(error).__name__}: {error}{places[-1] if places else ''}"
