"""What a prepared log contains: the hand-over from `prepare` to models and loader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Kind = Literal["categorical", "numeric", "multivalued", "sequence"]
PADDING_ID, UNKNOWN_ID, FIRST_ID = 0, 1, 2


def module_key(name: str) -> str:
    """What the module of a column or vocabulary is called in a model: no name of a module has a "."."""
    return name.replace(".", "_")


@dataclass(frozen=True)
class Field:
    """One input of a model.

    Attributes:
        name: The column's name.
        kind: `categorical` one id; `numeric` one float, NaN where missing; `multivalued` a set of ids; `sequence` ids, oldest first.
        vocabulary: The vocabulary that its ids come from, and so the table they are looked up in. Fields that name the same one share it
            (a behaviour sequence of items and the item). None for numeric fields.
        num_embeddings: V, rows of that table, padding (0) and unknown (1) included. 0 for numeric fields.
        max_length: Longest list that is kept, for multivalued and sequence fields; 0 otherwise.
        transform: How `prepare` made the ids or floats from the raw values, e.g. {"name": "log_bucket"}; None if it only looked them up.
    """

    name: str
    kind: Kind
    vocabulary: str | None = None
    num_embeddings: int = 0
    max_length: int = 0
    transform: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Field {self.name!r}: kind {self.kind!r} is unknown. Choose one of {list(get_args(Kind))}.")

    @property
    def is_list(self) -> bool:
        """Whether a row holds a list of ids."""
        return self.kind in ("multivalued", "sequence")


@dataclass(frozen=True)
class Schema:
    """The fields of a prepared log, in column order, and the name of its label (0 or 1)."""

    fields: tuple[Field, ...]
    label: str = "label"

    @property
    def vocabularies(self) -> dict[str, int]:
        """Vocabulary -> V, in order of first use."""
        return {field.vocabulary: field.num_embeddings for field in self.fields if field.vocabulary is not None}

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Schema:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is missing or is no schema.
        """
        try:
            raw = json.loads(path.read_text())
            return cls(fields=tuple(Field(**field) for field in raw["fields"]), label=raw["label"])
        except FileNotFoundError:
            raise ValueError(f"{path}: not found. Is {path.parent} a folder that `leanrec prepare` wrote?") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a schema that `leanrec prepare` wrote ({error}).") from None
