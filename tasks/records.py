"""A record: named fields as they stand in their file, and where they stand.

Knows JSON's values; must not know files, tokenizers or what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Fields = Mapping[str, Any]
"""Name -> a string, or a value of JSON; what is missing (null, NaN, an empty cell) is None or not there."""


class Record(NamedTuple):
    """The fields of one record, and where it stands."""

    fields: Fields
    file: str  # or the data set's name
    row: str  # as in ``line 3``; empty where the file is the record

    @property
    def where(self) -> str:
        return f"{self.file}, {self.row}" if self.row else self.file


@dataclass(frozen=True)
class Corpus:
    """The records of a task, or those of one client, and what of the task's files is not among them."""

    records: Sequence[Record]
    unreadable: tuple[str, ...] = ()  # where and why, of each row that ``task.on_bad_record=skip`` left out
    left_out: tuple[str, ...] = ()  # which files, and why

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @property
    def names(self) -> list[str]:
        """Of all fields, in the order of their first record."""
        return list(dict.fromkeys(name for record in self.records for name in record.fields))


class Literal(float):
    """A number of JSON that is no whole one, with its spelling: ``1.50`` stays ``1.50``."""

    spelling: str

    def __new__(cls, spelling: str) -> Literal:
        number = super().__new__(cls, spelling)
        number.spelling = spelling
        return number


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; NaN is None, and numbers keep their spelling; see ``as_text``.

    Raises:
        ValueError: no JSON, no UTF-8, or nested too deeply.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, parse_float=Literal, parse_constant=_constant)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("no JSON (nested too deeply)") from None
    except ValueError as error:  # a whole number of more digits than Python reads
        raise ValueError(f"no JSON ({str(error).split(';')[0]})") from None


def as_text(value: Any) -> str:
    """A field as text: a string as it is, any other value as JSON. Raises ValueError: nested too deeply."""
    try:
        return value if isinstance(value, str) else _written(value)
    except RecursionError:
        raise ValueError("a value that is nested too deeply") from None


def is_missing(value: Any) -> bool:
    """Whether a field counts as absent: null or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_written(str(key))}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_written, value)) + "]"
    return value.spelling if isinstance(value, Literal) else json.dumps(value, ensure_ascii=False)
