"""Which records each client holds, the same for the same arguments on every machine.

Knows records and partitioners; must not know what the records say, tokenizers or models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.records import Corpus, Record, as_text
from tasks.settings import BY_COLUMN

if TYPE_CHECKING:  # both take seconds to load, for which a task that deals nothing need not wait
    from datasets import Dataset
    from flwr_datasets.partitioner.partitioner import Partitioner


def deal(
    corpus: Corpus, num_clients: int, *, partition: str, column: str | None, alpha: float, seed: int, path: str
) -> Callable[[int], Corpus]:
    """Deals records out to clients: every record to one of them, in a shuffled order.

    Args:
        partition: ``iid``; ``dirichlet``: each value of ``column`` is spread over the clients by a Dirichlet
            distribution (Hsu et al. 2019) of concentration ``alpha``, smaller is less alike; ``column``: one client
            for every value, in their sorted order.
        path: where the records are from; for messages.

    Returns:
        Client (0 to ``num_clients - 1``) -> its records.

    Raises:
        ValueError: fewer records than clients, a missing column, or a client without records.
    """
    records = corpus.records
    if len(records) == 0:
        raise ValueError(f"task.path={path!r} holds no record")
    if len(records) < num_clients:
        raise ValueError(f"task.path={path!r} holds {len(records)} records for {num_clients} clients: fewer clients?")
    from datasets import Dataset

    keys = Dataset.from_dict({"row": range(len(records))})
    if partition in BY_COLUMN:
        assert column is not None
        if column not in corpus.names:
            names = ", ".join(corpus.names)
            raise ValueError(f"task.partition_by={column!r} is no column of {path}: it has {names}")
        keys = keys.add_column(column, [value_of(record, column) for record in records])
    partitioner = _partitioner(keys, num_clients, partition, column or "", alpha, seed)
    partitioner.dataset = keys.shuffle(seed=seed)

    def holding(client: int) -> Corpus:
        return dataclasses.replace(corpus, records=[records[row] for row in _quietly(partitioner, client)["row"]])

    holding(0)  # an impossible deal is refused here
    return holding


def value_of(record: Record, column: str) -> str:
    """What a record holds in the column that the partition goes by, as text; empty where it is missing."""
    value = record.fields.get(column)
    return "" if value is None else as_text(value)


def own_path(folder: str, client: int) -> str:
    """What is named after a client in a folder, ``client-3.jsonl`` or a folder ``client-3``: its data alone.

    Raises:
        ValueError: there is none, or more than one.
    """
    name = f"client-{client}"
    found = sorted(path for path in Path(folder).glob(f"{name}*") if path.name.split(".")[0] == name)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "nothing of that name"
        raise ValueError(
            f"task.partition=local: task.path={folder!r} must hold one file or folder client-{client}, "
            f"as in client-{client}.jsonl; there is {names}"
        )
    return str(found[0])


def _partitioner(keys: Dataset, num_clients: int, partition: str, column: str, alpha: float, seed: int) -> Partitioner:
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    if partition == "dirichlet":
        return DirichletPartitioner(num_clients, column, alpha, min_partition_size=1, seed=seed)
    if partition == "iid":
        return IidPartitioner(num_clients)
    assert partition == "column"
    num_values = len(keys.unique(column))
    if num_values != num_clients:
        raise ValueError(
            f"task.partition=column gives every value of {column!r} a client of its own, and there are {num_values} "
            f"values: set federation.num_clients={num_values}, not {num_clients}"
        )
    return NaturalIdPartitioner(column)


def _quietly(partitioner: Partitioner, client: int) -> Dataset:
    """One partition, without the library's warnings and bars."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return partitioner.load_partition(client)
        except ValueError:
            raise ValueError(
                "task.partition=dirichlet leaves a client without records in every draw: "
                "fewer federation.num_clients or a larger task.alpha"
            ) from None
