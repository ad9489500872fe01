"""Options for logs whose columns are known."""

from __future__ import annotations

from typing import Any

from leanrec.data.settings import FieldSettings

# Format -> (options for the whole log, options of single columns).
PRESETS: dict[str | None, tuple[dict[str, Any], dict[str, FieldSettings]]] = {
    "criteo": (
        {
            "delimiter": "\t",
            "header": False,
            "columns": ("label", *(f"I{number}" for number in range(1, 14)), *(f"C{number}" for number in range(1, 27))),
            "numeric": "log-bucket",
        },
        {
            "label": FieldSettings(kind="label"),
            **{f"I{number}": FieldSettings(kind="numeric") for number in range(1, 14)},
            **{f"C{number}": FieldSettings(kind="categorical") for number in range(1, 27)},
        },
    ),
}
