"""One file -> its records, row by row, as they stand: no value is guessed a type.

JSON's values stay what they are, cells of CSV are strings, parquet's dates become ISO text. A row that cannot be read
is yielded as an ``Unreadable``, so that the reader goes on behind it; what cannot be read at all is a ValueError. Knows
file formats; must not know folders, tasks or what the fields mean.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from tasks.records import Record, is_missing, parsed
from tasks.settings import format_of

BOM = b"\xef\xbb\xbf"
RECORD_FIELDS = frozenset({"text", "messages", "conversations", "instruction", "prompt", "question"})
"""An object of JSON with one of these is a record and no wrapper around records."""


class Unreadable(NamedTuple):
    """A row that is no record: where, and why."""

    row: str
    reason: str


Row = tuple[str, dict[str, Any]] | Unreadable


def read_file(file: Path) -> Iterator[Record | Unreadable]:
    """Yields every row of a file of one of the ``FORMATS``; ``row`` of an ``Unreadable`` has the file's name.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    try:
        for row in _READERS[format_of(file)](file):
            if isinstance(row, Unreadable):
                yield Unreadable(f"{file}, {row.row}", row.reason)
            else:
                yield Record(row[1], str(file), row[0])
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise ValueError(f"{file} cannot be read: {reason}") from None


def plain(value: Any) -> Any:
    """A value of a table as JSON has it: dates as ISO text, decimals and bytes as their text, NaN as None."""
    if is_missing(value):
        return None
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return format(value, "f") if isinstance(value, decimal.Decimal) else str(value)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _json_lines(file: Path) -> Iterator[Row]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if text := line.removeprefix(BOM if number == 1 else b"").strip():
                yield _object(f"line {number}", text)


def _object(row: str, text: bytes) -> Row:
    try:
        value = parsed(text)
    except json.JSONDecodeError as error:
        return Unreadable(row, f"no JSON ({error})")
    except ValueError as error:
        return Unreadable(row, str(error))
    return _fields(row, value)


def _fields(row: str, value: Any) -> Row:
    if isinstance(value, dict):
        return row, value
    return Unreadable(row, f"a JSON object is expected, not {type(value).__name__}")


def _json(file: Path) -> Iterator[Row]:
    """A list of objects, an object around one list of objects, or lines of objects."""
    with _open(file) as stream:
        text = stream.read().removeprefix(BOM)
    try:
        value = parsed(text) if text.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith(b"{"):
            yield from _json_lines(file)
            return
        raise ValueError(f"{file}, line {error.lineno}: no JSON ({error})") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    del text
    for number, item in enumerate(_list_in(value, file), 1):
        yield _fields(f"record {number}", item)


def _list_in(value: Any, file: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}: a list of objects is expected")
    if RECORD_FIELDS.intersection(value):
        return [value]
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}
    if len(lists) != 1:
        found = ", ".join(lists) or "none"
        raise ValueError(f"{file} holds one object: it needs one list of objects in it, and there is {found}")
    [records] = lists.values()
    return records


def _csv(file: Path) -> Iterator[Row]:
    yield from _table(file, ",")


def _tsv(file: Path) -> Iterator[Row]:
    yield from _table(file, "\t")


def _table(file: Path, delimiter: str) -> Iterator[Row]:
    """The first line names the columns. Strict: a lone quotation mark would swallow the rows behind it."""
    csv.field_size_limit(2**31 - 1)
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        columns: list[str] | None = None
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, at line {line} or behind it: no UTF-8 ({error.reason})") from None
            except csv.Error as error:
                if columns is None or "unexpected end" in str(error):
                    raise ValueError(f"{file}, line {line}: no CSV ({error})") from None
                yield Unreadable(f"line {line}", f"no CSV ({error})")
                continue
            if cells is None:
                return
            if not cells:
                continue
            if columns is None:
                columns = _columns(cells, file)
            elif len(cells) != len(columns):
                yield Unreadable(f"line {line}", f"{len(cells)} values for {len(columns)} columns")
            else:
                yield f"line {line}", {name: cell or None for name, cell in zip(columns, cells, strict=True)}


def _columns(cells: list[str], file: Path) -> list[str]:
    columns = [cell.strip() for cell in cells]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"{file}: its first line names the column {twice[0]!r} twice")
    return columns


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]  # here, as it takes a second that most tasks do not need
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                columns = {name: batch.column(name) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        yield f"row {number}", {name: plain(column[i].as_py()) for name, column in columns.items()}
                    except UnicodeDecodeError as error:
                        yield Unreadable(f"row {number}", f"no UTF-8 ({error.reason})")
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{file} cannot be read as parquet: {reason}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
