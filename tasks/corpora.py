"""Which texts each client holds: the embedded task (source code of the standard library), JSONL and text folders.

Knows files and partitions; must not know tokenizers, models or federations.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

from tasks.stdlib import packages

TASKS = ("stdlib", "jsonl", "text")


def client_texts(
    name: str,
    path: str | None,
    client: int,
    num_clients: int,
    *,
    partition_by: str | None,
    alpha: float,
    seed: int,
) -> list[str]:
    """The texts of one client, the same for the same arguments.

    Args:
        name: ``stdlib``, ``jsonl`` (one object a line; see ``_record_text``) or ``text`` (a folder of .txt and .md).
        path: file or folder; unused by ``stdlib``.
        client: 0 to ``num_clients - 1``.
        partition_by: column whose values are spread over the clients by a Dirichlet distribution; None: evenly.
        alpha: concentration of that distribution, smaller is less alike.

    Raises:
        ValueError: nothing there, a broken record, a missing column, or a client without text.
    """
    if not 0 <= client < num_clients:
        raise ValueError(f"client {client} of {num_clients}: partition ids go from 0 to {num_clients - 1}")
    if name == "stdlib":
        return _package_texts(client, num_clients)
    if path is None:
        raise ValueError(f"task.name={name} needs task.path: the {'file' if name == 'jsonl' else 'folder'} to read")
    if name == "jsonl":
        rows = _read_jsonl(Path(path))
    elif name == "text":
        rows = _read_folder(Path(path))
    else:
        raise ValueError(f"task.name={name!r} is none of {', '.join(TASKS)}")
    mine = _share(rows, client, num_clients, partition_by, alpha, seed, path)
    return [_record_text(row, path) for row in mine]


def _package_texts(client: int, num_clients: int) -> list[str]:
    """One package a client, the largest first; with more clients than packages, several share one package's files."""
    found = list(packages().items())
    if not found:
        raise ValueError("this Python has no source code of its standard library: use task.name=jsonl or text")
    _, files = found[client % len(found)]
    sharers = range(client % len(found), num_clients, len(found))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    lines = text.splitlines(keepends=True)
    part = sharers.index(client)
    return ["".join(lines[len(lines) * part // len(sharers) : len(lines) * (part + 1) // len(sharers)])]


def _read_jsonl(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"task.path={str(path)!r} is no file: give a JSONL file")
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a JSON object is expected, not {type(row).__name__}")
            rows.append({key: "" if value is None else str(value) for key, value in row.items()})
    return rows


def _read_folder(path: Path) -> list[dict[str, str]]:
    if not path.is_dir():
        raise ValueError(f"task.path={str(path)!r} is no folder: give a folder of .txt or .md files")
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
    try:
        return [{"text": file.read_text(encoding="utf-8")} for file in files]
    except UnicodeDecodeError as error:
        raise ValueError(f"task.path={str(path)!r} holds a file that is not UTF-8 text: {error}") from None


def _record_text(row: dict[str, str], path: str) -> str:
    """``text``, or the Alpaca form of ``instruction`` / ``input`` / ``output`` (Dolly: ``context``, ``response``)."""
    if "text" in row:
        return row["text"]
    answer = row.get("output", row.get("response"))
    if "instruction" not in row or answer is None:
        keys = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{path}: a record needs 'text', or 'instruction' and 'output'; it has {keys}")
    given = row.get("input", row.get("context", ""))
    question = f"### Instruction:\n{row['instruction']}\n" + (f"\n### Input:\n{given}\n" if given else "")
    return f"{question}\n### Response:\n{answer}"


def _share(
    rows: Sequence[dict[str, str]],
    client: int,
    num_clients: int,
    partition_by: str | None,
    alpha: float,
    seed: int,
    path: str,
) -> list[dict[str, str]]:
    if len(rows) < num_clients:
        raise ValueError(f"task.path={path!r} holds {len(rows)} records for {num_clients} clients: fewer clients?")
    table = Dataset.from_list(
        [
            {"row": i, **({partition_by: row.get(partition_by, "")} if partition_by else {})}
            for i, row in enumerate(rows)
        ]
    )
    if partition_by is None:
        partitioner = IidPartitioner(num_partitions=num_clients)
    else:
        if not any(partition_by in row for row in rows):
            raise ValueError(f"task.partition_by={partition_by!r} is no column of {path}")
        partitioner = DirichletPartitioner(
            num_partitions=num_clients, partition_by=partition_by, alpha=alpha, min_partition_size=1, seed=seed
        )
    partitioner.dataset = table.shuffle(seed=seed)
    return [rows[i] for i in sorted(partitioner.load_partition(client)["row"])]
