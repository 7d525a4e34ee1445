"""One client's shard: its windows, split into what the codec learns from, what the model learns from, and held out.

``D1 : D2 = 3 : 7`` is the paper's split (section 3.1): TGAP records gradients on D1, federated fine-tuning (FAF) runs
on D2. The last tenth of every client's windows is held out from both.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from adapters.windows import Windows
from tasks.brought import read_brought
from tasks.corpora import package_text, read_records, read_texts
from tasks.examples import Example
from tasks.exams import read_exam
from tasks.partitions import deal, own_path
from tasks.records import Corpus, Record
from tasks.settings import EXAMS, TASKS, TaskSettings, has_fields
from tasks.templates import Renderer, check_template
from tasks.windows import Cut, Tokenizer, packed, padded, tokens_of

SKIPPING = "task.on_bad_record=skip leaves such records out"


@dataclass(frozen=True)
class Shard:
    """One client's windows."""

    train: Windows
    heldout: Windows
    num_cut: int = 0  # records that were longer than a window
    num_empty: int = 0  # records left out: an empty answer, or no token that counts in their window
    num_over: int = 0  # records left out, whole or in part, since `max_windows` were full
    bad: tuple[str, ...] = ()  # where and why: its records that were left out
    unreadable: tuple[str, ...] = ()  # where and why: rows of the task's files, of no client
    left_out: tuple[str, ...] = ()  # files of the task
    notes: Mapping[str, int] = field(default_factory=dict)  # what is not trained on as it stands -> in how many records


def what_is_lost(shards: Sequence[Shard], settings: TaskSettings) -> list[str]:
    """One line for each way in which these clients' records are not trained on as they stand, for a log."""
    cut, empty, over = (sum(getattr(shard, f"num_{key}") for shard in shards) for key in ("cut", "empty", "over"))
    bad = list(dict.fromkeys(line for shard in shards for line in (*shard.unreadable, *shard.bad)))
    notes: Counter[str] = Counter()
    for shard in shards:
        notes.update(shard.notes)
    lines = {
        **{line: 1 for shard in shards for line in shard.left_out},
        f"{cut} records are longer than task.window={settings.window} tokens and are cut": cut,
        f"{empty} records are left out: an empty answer, or no token that counts is in their window": empty,
        f"{over} records are left out, whole or in part: task.max_windows={settings.max_windows} a client": over,
        f"{len(bad)} records are left out by task.on_bad_record=skip; the first: {''.join(bad[:1])}": len(bad),
        **{f"{count} records: {note}": count for note, count in notes.items()},
    }
    return [line for line, count in lines.items() if count]


def client_records(settings: TaskSettings, num_clients: int) -> Callable[[int], Corpus]:
    """Reads the task's records once and deals them out.

    Returns:
        Client (0 to ``num_clients - 1``) -> its records. With ``task.partition=local`` its own file is read then, and
        no other.

    Raises:
        ValueError: the data is not as the settings say; see ``tasks.corpora`` and ``tasks.partitions``.
    """
    if settings.name == "stdlib":
        return lambda client: Corpus([Record({"text": package_text(client, num_clients)}, "stdlib", "")])
    if settings.partition == "local":
        folder = settings.path
        assert folder is not None, "check_task refuses this"
        return lambda client: _dealt(settings, own_path(folder, client), 1)(0)
    return _dealt(settings, settings.path, num_clients)


def _dealt(settings: TaskSettings, path: str | None, num_clients: int) -> Callable[[int], Corpus]:
    return deal(
        _read(settings, path),
        num_clients,
        partition="iid" if settings.partition == "local" else settings.partition,
        column=settings.partition_by,
        alpha=settings.alpha,
        seed=settings.partition_seed,
        path=path or settings.name,
    )


def _read(settings: TaskSettings, path: str | None) -> Corpus:
    if settings.name not in TASKS:
        return read_brought(settings, path)
    assert path is not None, "check_task refuses this"
    if settings.name in EXAMS:
        return read_exam(settings.name, path)
    return read_texts(path) if settings.name == "text" else read_records(path, settings.on_bad_record)


def load_shard(settings: TaskSettings, tokenizer: Tokenizer, client: int, num_clients: int) -> Shard:
    """One client's shard; see ``load_shards``."""
    if not 0 <= client < num_clients:
        raise ValueError(f"client {client} of {num_clients}: partition ids go from 0 to {num_clients - 1}")
    return next(load_shards(settings, tokenizer, [client], num_clients))


def load_shards(
    settings: TaskSettings, tokenizer: Tokenizer, clients: Iterable[int], num_clients: int
) -> Iterator[Shard]:
    """The shards of some clients; nothing else is tokenised. Those of ``task=stdlib``, whose text cannot change, are
    made once a process: do not change them.

    Raises:
        ValueError: the data is not as the settings say, or a client has too little of it for one training and one
            held-out window.
    """
    digest = _digest(tokenizer) if settings.name == "stdlib" else None
    if digest is not None:
        for client in clients:
            yield _kept(_Order(repr(settings), client, num_clients, digest, settings, tokenizer))
        return
    records_of = client_records(settings, num_clients)
    for client in clients:
        yield shard_of(settings, tokenizer, records_of(client), client, num_clients)


@dataclass(frozen=True)
class _Order:
    """A shard of the embedded task, and all that it depends on."""

    key: str
    client: int
    num_clients: int
    digest: str  # of the tokenizer
    settings: TaskSettings = field(compare=False)
    tokenizer: Tokenizer = field(compare=False)


@functools.lru_cache(maxsize=64)
def _kept(order: _Order) -> Shard:
    records = client_records(order.settings, order.num_clients)(order.client)
    return shard_of(order.settings, order.tokenizer, records, order.client, order.num_clients)


def _digest(tokenizer: Tokenizer) -> str | None:
    """Of all that decides on a text's tokens; None: a tokenizer that cannot be looked into."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    tokens = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.sha256(f"{backend.to_str()}{tokens}".encode()).hexdigest()


def shard_of(settings: TaskSettings, tokenizer: Tokenizer, records: Corpus, client: int, num_clients: int) -> Shard:
    """One client's records -> its shard. Raises ValueError: a record that cannot be rendered, or too few of them."""
    check_template(settings.template if has_fields(settings.name) else "none", tokenizer)
    reading = _Reading(settings, tokenizer)
    if settings.packing:
        most = settings.max_windows * settings.window
        made = packed(tokens_of(reading.examples(records), tokenizer, most), settings.window, settings.max_windows)
    else:
        tokens = tokens_of(reading.examples(records), tokenizer, settings.window)
        made = padded(islice(tokens, settings.max_windows), tokenizer, settings.window)
    windows = made.windows
    num_heldout = max(1, int(len(windows) * settings.heldout_fraction))
    train, heldout = windows[:-num_heldout], windows[-num_heldout:]
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(client))]
    num_tgap = round(len(train) * settings.tgap_fraction)
    part = {"tgap": shuffled[:num_tgap], "faf": shuffled[num_tgap:], "all": shuffled}[settings.split]
    if len(part) == 0:
        raise ValueError(f"client {client} of {num_clients}{_too_few(settings, records, made, reading)}")
    return Shard(
        part,
        heldout[: settings.heldout_windows],
        num_cut=made.num_cut,
        num_empty=made.num_empty + reading.num_empty,
        num_over=len(records) - made.num_read - reading.num_empty - len(reading.bad),
        bad=tuple(reading.bad),
        unreadable=records.unreadable,
        left_out=records.left_out,
        notes=dict(reading.notes),
    )


class _Reading:
    """Renders records one after another, and keeps account of those that become nothing."""

    def __init__(self, settings: TaskSettings, tokenizer: Tokenizer) -> None:
        self._settings = settings
        self._renderer = Renderer(settings.template, settings.loss_on, settings.system, tokenizer)
        self.num_empty = 0
        self.bad: list[str] = []

    @property
    def notes(self) -> Mapping[str, int]:
        return self._renderer.notes

    def examples(self, records: Iterable[Record]) -> Iterator[Example]:
        for record in records:
            try:
                examples = self._renderer.examples(record.fields)
            except ValueError as error:
                if self._settings.on_bad_record == "stop":
                    raise ValueError(f"{record.where}: {error} ({SKIPPING})") from None
                self.bad.append(f"{record.where}: {error}")
                continue
            self.num_empty += not examples
            yield from examples


def _too_few(settings: TaskSettings, records: Corpus, made: Cut, reading: _Reading) -> str:
    if reading.bad:
        return f": {len(reading.bad)} of {len(records)} records cannot be trained on; the first: {reading.bad[0]}"
    num_empty = made.num_empty + reading.num_empty
    if num_empty > len(made.windows):
        return (
            f": in {num_empty} of {len(records)} records the answer is empty, or no token that counts lies within "
            f"task.window={settings.window}, so too few are left: give a larger task.window"
        )
    return (
        f" has {len(made.windows)} windows of {settings.window} tokens, none of them in task.split={settings.split}: "
        "give it more text, fewer clients or a smaller task.window"
    )
