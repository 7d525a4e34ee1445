"""Where records come from: the embedded task, a data set's name on the hub, files and folders.

Knows files; must not know tokenizers, models, clients or federations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from tasks.folders import data_files, same_names
from tasks.readers import Unreadable, plain, read_file
from tasks.records import Corpus, Record
from tasks.settings import FORMATS, format_of, is_hub_name, is_text
from tasks.stdlib import packages


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


def read_records(path: str, on_bad_record: str = "stop") -> Corpus:
    """The records of a file, of all files in a folder, or of the split ``train`` of a data set on the hub.

    Files are read into memory, row by row, and leave no copy in a cache.

    Args:
        on_bad_record: ``stop``: a row that cannot be read is an error; ``skip``: it is counted and left out.

    Raises:
        ValueError: nothing there, nothing that can be read, or a row that cannot be.
    """
    found = Path(path)
    if not found.exists() and is_hub_name(path):
        return _from_hub(path)
    left_out: list[str] = []
    if found.is_dir():
        files, left_out = data_files(found, lambda file: format_of(file) != "")
    elif found.is_file():
        files = [found]
    else:
        raise ValueError(f"task.path={path!r} is no file, no folder and no data set's name on the hub (owner/name)")
    _check_kinds(path, files)
    return _sorted_out((row for file in files for row in read_file(file)), on_bad_record, tuple(left_out))


def read_texts(path: str) -> Corpus:
    """One record a file, with its ``text``: a text file, or all those in a folder.

    Raises:
        ValueError: nothing there, or a file that is not UTF-8.
    """
    found = Path(path)
    left_out: list[str] = []
    if found.is_dir():
        files, left_out = data_files(found, is_text)
    elif found.is_file():
        files = [found]
    else:
        raise ValueError(f"task.path={path!r} is no folder: give a folder of .txt or .md files")
    return Corpus([Record({"text": _text(file)}, str(file), "") for file in files], (), tuple(left_out))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _check_kinds(path: str, files: list[Path]) -> None:
    """Raises ValueError: files that cannot be read, or that hold the same data twice."""
    kinds = {format_of(file) for file in files}
    families = {"json" if kind in (".jsonl", ".ndjson", ".json") else kind for kind in kinds}
    if len(families) != 1 or "" in families:
        found = [kind for kind in sorted(kinds) if kind] or sorted({file.suffix or file.name for file in files})
        holds = ", ".join(found) or "none of them"
        raise ValueError(f"task.path={path!r} must hold files of one kind ({', '.join(FORMATS)}): it holds {holds}")
    for copies in same_names(files):
        names = " and ".join(file.name for file in copies)
        raise ValueError(f"task.path={path!r} holds {names}, which seem to be the same data twice: keep one of them")


def _sorted_out(rows: Iterable[Record | Unreadable], on_bad_record: str, left_out: tuple[str, ...]) -> Corpus:
    records: list[Record] = []
    unreadable: list[str] = []
    for row in rows:
        if isinstance(row, Record):
            records.append(row)
            continue
        if on_bad_record == "stop":
            raise ValueError(f"{row.row}: {row.reason} (task.on_bad_record=skip leaves such records out)")
        unreadable.append(f"{row.row}: {row.reason}")
    return Corpus(records, tuple(unreadable), left_out)


def _from_hub(name: str) -> Corpus:
    from datasets import load_dataset  # here, as it takes seconds that files do not need

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what they have to say comes as an exception too
    try:
        rows = load_dataset(name, split="train")
        return Corpus([Record(plain(row), name, f"row {number}") for number, row in enumerate(rows, 1)])
    except Exception as error:  # the hub, the network and `datasets` have a dozen kinds
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"task.path={name!r} is no file here, and the hub does not give it ({reason}): give task.path=FILE, or "
            "allow the network with HF_HUB_OFFLINE=0"
        ) from None
