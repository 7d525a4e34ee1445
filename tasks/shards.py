"""One client's shard: its windows, split into what the codec learns from, what the model learns from, and held out.

``D1 : D2 = 3 : 7`` is the paper's split (section 3.1): TGAP records gradients on D1, federated fine-tuning (FAF) runs
on D2. The last tenth of every client's windows is held out from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from datasets import Dataset

from adapters.finetune import Windows
from tasks.corpora import package_text, read_records, read_texts
from tasks.exams import read_exam
from tasks.partitions import deal, own_path
from tasks.settings import EXAMS, RECORDS, TaskSettings
from tasks.templates import Example, check_template, example_of
from tasks.windows import Tokenizer, packed, padded, tokens_of


@dataclass(frozen=True)
class Shard:
    """One client's windows."""

    train: Windows
    heldout: Windows
    num_cut: int = 0  # records that were longer than a window
    num_empty: int = 0  # records left out, since no token that counts was in their window
    num_over: int = 0  # records left out, whole or in part, since `max_windows` were full


def what_is_lost(shards: Sequence[Shard], settings: TaskSettings) -> list[str]:
    """One line for each way in which these clients' records are not trained on, for a log."""
    cut, empty, over = (sum(getattr(shard, f"num_{key}") for shard in shards) for key in ("cut", "empty", "over"))
    lines = {
        f"{cut} records are longer than task.window={settings.window} tokens and are cut": cut,
        f"{empty} records are left out: no token that counts is in their window": empty,
        f"{over} records are left out, whole or in part: task.max_windows={settings.max_windows} a client": over,
    }
    return [line for line, count in lines.items() if count]


def client_records(settings: TaskSettings, num_clients: int) -> Callable[[int], Dataset]:
    """Reads the task's records once and deals them out.

    Returns:
        Client (0 to ``num_clients - 1``) -> its records. With ``task.partition=local`` its own file is read then, and
        no other.

    Raises:
        ValueError: the data is not as the settings say; see ``tasks.corpora`` and ``tasks.partitions``.
    """
    if settings.name == "stdlib":
        return lambda client: Dataset.from_dict({"text": [package_text(client, num_clients)]})
    assert settings.path is not None, "check_task refuses this"
    if settings.partition == "local":
        folder = settings.path
        return lambda client: _dealt(settings, own_path(folder, client), 1)(0)
    return _dealt(settings, settings.path, num_clients)


def _dealt(settings: TaskSettings, path: str, num_clients: int) -> Callable[[int], Dataset]:
    return deal(
        _read(settings.name, path),
        num_clients,
        partition="iid" if settings.partition == "local" else settings.partition,
        column=settings.partition_by,
        alpha=settings.alpha,
        seed=settings.partition_seed,
        path=path,
    )


def _read(name: str, path: str) -> Dataset:
    if name in EXAMS:
        return read_exam(name, path)
    return read_texts(path) if name == "text" else read_records(path)


def load_shard(settings: TaskSettings, tokenizer: Tokenizer, client: int, num_clients: int) -> Shard:
    """One client's shard; see ``load_shards``."""
    if not 0 <= client < num_clients:
        raise ValueError(f"client {client} of {num_clients}: partition ids go from 0 to {num_clients - 1}")
    return next(load_shards(settings, tokenizer, [client], num_clients))


def load_shards(
    settings: TaskSettings, tokenizer: Tokenizer, clients: Iterable[int], num_clients: int
) -> Iterator[Shard]:
    """The shards of some clients; nothing else is tokenised.

    Raises:
        ValueError: the data is not as the settings say, or a client has too little of it for one training and one
            held-out window.
    """
    records_of = client_records(settings, num_clients)
    for client in clients:
        yield shard_of(settings, tokenizer, records_of(client), client, num_clients)


def shard_of(settings: TaskSettings, tokenizer: Tokenizer, records: Dataset, client: int, num_clients: int) -> Shard:
    """One client's records -> its shard. Raises ValueError: a record that cannot be rendered, or too few of them."""
    check_template(settings.template if settings.name in RECORDS else "none", tokenizer)
    tokens = tokens_of(_examples(settings, tokenizer, records), tokenizer)
    if settings.packing:
        made = packed(tokens, settings.window, settings.max_windows)
    else:
        made = padded(islice(tokens, settings.max_windows), tokenizer, settings.window)
    windows = made.windows
    num_heldout = max(1, int(len(windows) * settings.heldout_fraction))
    train, heldout = windows[:-num_heldout], windows[-num_heldout:]
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(client))]
    num_tgap = round(len(train) * settings.tgap_fraction)
    part = {"tgap": shuffled[:num_tgap], "faf": shuffled[num_tgap:], "all": shuffled}[settings.split]
    if len(part) == 0:
        if made.num_empty > len(windows):
            raise ValueError(
                f"client {client} of {num_clients}: in {made.num_empty} of {len(records)} records no token that counts "
                f"lies within task.window={settings.window}, so too few are left: give a larger task.window"
            )
        raise ValueError(
            f"client {client} of {num_clients} has {len(windows)} windows of {settings.window} tokens, none of them "
            f"in task.split={settings.split}: give it more text, fewer clients or a smaller task.window"
        )
    num_over = len(records) - made.num_read
    return Shard(part, heldout[: settings.heldout_windows], made.num_cut, made.num_empty, num_over)


def _examples(settings: TaskSettings, tokenizer: Tokenizer, records: Dataset) -> Iterator[Example]:
    for record in records:
        try:
            yield example_of(record, settings.template, settings.loss_on, tokenizer)
        except ValueError as error:
            raise ValueError(f"{settings.path or settings.name}: {error}") from None
