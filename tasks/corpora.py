"""Where records come from: the embedded task, a data set's name on the hub, files and folders.

Knows files; must not know tokenizers, models, clients or federations.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

from adapters.settings import is_hub_name
from tasks.settings import FORMATS, TEXTS
from tasks.stdlib import packages

for library in ("datasets", "huggingface_hub"):
    logging.getLogger(library).setLevel(logging.CRITICAL)  # what they have to say comes as an exception too


def package_text(client: int, num_clients: int) -> str:
    """Source code of one package a client, the largest first; with more clients than packages, several share one."""
    found = list(packages().items())
    if not found:
        raise ValueError("this Python has no source code of its standard library: use task=jsonl or task=text")
    _, files = found[client % len(found)]
    sharers = range(client % len(found), num_clients, len(found))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    lines = text.splitlines(keepends=True)
    part = sharers.index(client)
    return "".join(lines[len(lines) * part // len(sharers) : len(lines) * (part + 1) // len(sharers)])


def read_records(path: str) -> Dataset:
    """The records of a file, of all files in a folder, or of the split ``train`` of a data set on the hub.

    Files are read into memory and leave no copy in a cache.

    Raises:
        ValueError: nothing there, nothing that can be read, or no record in it.
    """
    found = Path(path)
    if not found.exists() and is_hub_name(path):
        return _from_hub(path)
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if file.suffix in FORMATS)
    elif found.is_file():
        files = [found]
    else:
        raise ValueError(f"task.path={path!r} is no file, no folder and no data set's name on the hub (owner/name)")
    kinds = {FORMATS.get(file.suffix, "") for file in files}
    if len(kinds) != 1 or "" in kinds:
        suffixes = ", ".join(sorted({file.suffix or file.name for file in files})) or "none of them"
        raise ValueError(f"task.path={path!r} must hold files of one kind ({', '.join(FORMATS)}): it holds {suffixes}")
    parts = [part for file in files if len(part := _read(file))]
    try:
        return concatenate_datasets(parts) if parts else Dataset.from_dict({})
    except ValueError as error:
        raise ValueError(f"task.path={path!r}: its files differ in the types of their columns: {error}") from None


def read_texts(path: str) -> Dataset:
    """One record a file, with its ``text``: a text file, or all those in a folder.

    Raises:
        ValueError: nothing there, or a file that is not UTF-8.
    """
    found = Path(path)
    if found.is_dir():
        files = sorted(file for file in found.rglob("*") if file.suffix in TEXTS)
    elif found.is_file():
        files = [found]
    else:
        raise ValueError(f"task.path={path!r} is no folder: give a folder of .txt or .md files")
    try:
        return Dataset.from_dict({"text": [file.read_text(encoding="utf-8") for file in files]})
    except UnicodeDecodeError as error:
        raise ValueError(f"task.path={path!r} holds a file that is not UTF-8 text: {error}") from None


def _from_hub(name: str) -> Dataset:
    try:
        return load_dataset(name, split="train")
    except Exception as error:  # the hub, the network and `datasets` have a dozen kinds
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"task.path={name!r} is no file here, and the hub does not give it ({reason}): give task.path=FILE, or "
            "allow the network with HF_HUB_OFFLINE=0"
        ) from None


def _read(file: Path) -> Dataset:
    try:
        stream = load_dataset(FORMATS[file.suffix], data_files=[str(file)], split="train", streaming=True)
        tables = list(stream.with_format("arrow").iter(batch_size=10_000))
        for table in tables:
            table.validate(full=True)  # the readers let bytes pass that are not UTF-8
        return concatenate_datasets([Dataset(table) for table in tables])
    except StopIteration:  # an empty file
        return Dataset.from_dict({})
    except Exception as error:  # pyarrow, pandas and `datasets` have a dozen kinds, all of them about this file
        raise ValueError(_complaint(file, error)) from None


def _complaint(file: Path, error: Exception) -> str:
    """What is wrong with a file, with the number of its first broken line if it is JSONL."""
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if problem := _problem(line):
                    return f"{file}, line {number}: {problem}"
    reason = str(error).split("\n")[0] or type(error).__name__
    return f"{file} cannot be read as {FORMATS[file.suffix]}: {reason}"


def _problem(line: str) -> str:
    if not line.strip():
        return ""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"no JSON ({error})"
    return "" if isinstance(row, dict) else f"a JSON object is expected, not {type(row).__name__}"
