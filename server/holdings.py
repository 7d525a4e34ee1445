"""What the clients of a task hold, as ``server.preview`` shows it: figures, and one example. Needs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from adapters.settings import num_steps
from adapters.windows import Windows
from conf.console import visible
from conf.schema import Settings
from tasks.partitions import value_of
from tasks.shards import Shard, client_records, shard_of

MOST_FREQUENT = 2
"""So many values of the partition's column are shown."""


@dataclass(frozen=True)
class Holding:
    """One client's data."""

    num_records: int  # without those that `task.on_bad_record=skip` left out
    values: Counter[str]  # of the column that the partition goes by
    shard: Shard


def holdings_of(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Holding]:
    """Every client's data. Raises ValueError: it is not as the settings say."""
    task, num_clients = settings.task, settings.federation.num_clients
    if num_clients < 1:
        raise ValueError(f"federation.num_clients={num_clients} must be at least 1")
    records_of = client_records(task, num_clients)
    holdings = []
    for client in range(num_clients):
        records = records_of(client)
        column = task.partition_by
        values = Counter() if column is None else Counter(value_of(record, column) for record in records)
        shard = shard_of(task, tokenizer, records, client, num_clients)
        holdings.append(Holding(len(records) - len(shard.bad), values, shard))
    return holdings


def holdings_table(settings: Settings, holdings: Sequence[Holding]) -> Table:
    """One row a client and one of all.

    Records are ``bad`` if ``task.on_bad_record=skip`` left them out, ``cut`` that are longer than a window, ``empty``
    if their answer is or no token that counts is left, and ``over`` if ``task.max_windows`` leaves them out, whole or
    in part; ``windows``, ``counted`` tokens and ``steps`` a round are those of ``task.split``, ``held out`` are
    windows.
    """
    task = settings.task
    table = Table(title=f"{task.name}, windows of {task.window} tokens, split {task.split}", box=None, pad_edge=False)
    for name in ("client", "records", "bad", "cut", "empty", "over", "windows", "counted", "steps", "held out"):
        table.add_column(name, justify="right", no_wrap=True)
    if task.partition_by is not None:
        table.add_column(Text(visible(task.partition_by)))
    rows = [_figures(settings, holding) for holding in holdings]
    for client, (row, holding) in enumerate(zip(rows, holdings, strict=True)):
        table.add_row(str(client), *(f"{figure:,}" for figure in row), _mix(holding.values))
    table.add_section()
    everything: Counter[str] = sum((holding.values for holding in holdings), Counter())
    table.add_row("all", *(f"{sum(column):,}" for column in zip(*rows, strict=True)), _mix(everything))
    return table


def _figures(settings: Settings, holding: Holding) -> list[int]:
    shard = holding.shard
    windows = len(shard.train)
    steps = num_steps(settings.train, windows)
    return [
        holding.num_records,
        len(shard.bad),
        shard.num_cut,
        shard.num_empty,
        shard.num_over,
        windows,
        shard.train.num_counted,
        steps,
        len(shard.heldout),
    ]


def _mix(values: Counter[str]) -> Text:
    shown = [f"{visible(value)} {count / values.total():.0%}" for value, count in values.most_common(MOST_FREQUENT)]
    return Text(", ".join([*shown, f"{len(values) - MOST_FREQUENT} more"] if len(values) > MOST_FREQUENT else shown))


def example_text(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The first window as the model reads it, without padding and what else follows the last token that counts."""
    window = windows[:1].trimmed()
    text = Text()
    tokens = zip(window.ids[0].tolist(), window.counted[0].tolist(), strict=True)
    for counts, run in groupby(tokens, key=lambda token: token[1]):
        decoded = visible(tokenizer.decode([token for token, _ in run]))
        text.append(f"[{decoded}]" if counts else decoded, style="green" if counts else "dim")
    return text
