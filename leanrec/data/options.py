"""The settings of one call of `prepare`: its arguments, over a TOML file, over the preset of the format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from leanrec.data.presets import PRESETS
from leanrec.data.settings import FieldSettings, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
OPTIONS = tuple(f.name for f in fields(Settings))
FIELD_OPTIONS = tuple(f.name for f in fields(FieldSettings))


def resolve_settings(config: Path | None, **given: Any) -> Settings:
    """Settings from the arguments of `prepare`, which win over the options in `config`, which win over a preset.

    Args:
        config: The TOML file, or None.
        given: Arguments as `prepare` takes them; None for those not given.

    Raises:
        ValueError: An option is wrong.
    """
    arguments, argument_fields = _from_arguments(**given)
    options, option_fields = read_config(config) if config is not None else ({}, {})
    format = arguments.get("format", options.get("format"))
    preset, preset_fields = PRESETS.get(format, ({}, {})) if isinstance(format, str) else ({}, {})
    merged = {**preset, **options, **arguments}
    if merged.get("delimiter") == "\\t":  # as one writes a tab on a command line
        merged["delimiter"] = "\t"
    if "columns" in merged:
        merged["columns"] = tuple(_values("columns", merged["columns"], str.strip))
    if "split" in merged:
        merged["split"] = tuple(_values("split", merged["split"], lambda text: _number("split", text, float)))
    return Settings(**merged, fields=_merge(argument_fields, option_fields, preset_fields))


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, FieldSettings]]:
    """Options of a TOML file: those of `Settings`, and a table `[fields]` of COLUMN = "KIND" or COLUMN = {kind = "KIND", min_count = 5, ...}.

    Raises:
        ValueError: The file is missing, is no TOML or has an option that does not exist.
    """
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: the file of settings cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML ({error}).") from None
    said = options.pop("fields", {})
    if not isinstance(said, dict):
        raise ValueError(f"{path}: fields={said!r}: a table [fields] of COLUMN = 'KIND' is needed.")
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise ValueError(f"{path}: option {unknown[0]!r} does not exist. Choose from {list(OPTIONS)}.")
    return options, {name: _field_settings(path, name, value) for name, value in said.items()}


def _field_settings(path: Path, name: str, value: Any) -> FieldSettings:
    options = {"kind": value} if isinstance(value, str) else value
    if not isinstance(options, dict) or options.keys() - set(FIELD_OPTIONS):
        raise ValueError(f"{path}: column {name!r} is {value!r}. Write a kind, or a table of {list(FIELD_OPTIONS)}.")
    return FieldSettings(**options)


def _from_arguments(
    *, kinds: Mapping[str, str] | Sequence[str] | None, min_count: int | str | Sequence[str] | None, **others: Any
) -> tuple[dict[str, Any], dict[str, FieldSettings]]:
    """Options for all columns, and those for single ones."""
    options = {name: value for name, value in others.items() if value is not None}
    kind_of = kinds if isinstance(kinds, Mapping) else dict(_pair(text, "kind") for text in kinds or ())
    counts = [] if min_count is None else [str(text) for text in (min_count if _is_list(min_count) else [min_count])]
    for text in counts:
        if "=" not in text:
            options["min_count"] = _number("min_count", text, int)
    count_of = dict(_pair(text, "min_count") for text in counts if "=" in text)
    of_kinds = {name: FieldSettings(kind=kind) for name, kind in kind_of.items()}
    of_counts = {name: FieldSettings(min_count=_number("min_count", count, int)) for name, count in count_of.items()}
    return options, _merge(of_kinds, of_counts)


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals or not value:
        raise ValueError(f"{option} {text!r}: write COLUMN={option.upper()}.")
    return name, value


def _values(option: str, given: str | Sequence[Any], convert: Callable[[str], T]) -> list[T]:
    values = given.split(",") if isinstance(given, str) else given
    if not _is_list(values):
        raise ValueError(f"{option}={given!r}: a list is needed, or its values with commas between them.")
    return [convert(str(value)) for value in values]


def _is_list(given: Any) -> TypeGuard[Iterable[Any]]:
    return isinstance(given, Iterable) and not isinstance(given, str | Mapping)


def _number(option: str, text: str, convert: Callable[[str], T]) -> T:
    try:
        return convert(text)
    except ValueError:
        raise ValueError(f"{option}={text!r}: {'a whole number' if convert is int else 'a number'} is needed.") from None


def _merge(*layers: Mapping[str, FieldSettings]) -> dict[str, FieldSettings]:
    """Entries of all layers, earlier ones first; for one name, each option comes from the first layer that has it."""
    merged: dict[str, FieldSettings] = {}
    for layer in layers:
        for name, later in layer.items():
            earlier = merged.get(name, FieldSettings())
            first = {option: getattr(later, option) if (value := getattr(earlier, option)) is None else value for option in FIELD_OPTIONS}
            merged[name] = FieldSettings(**first)
    return merged
