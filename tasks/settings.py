"""The settings of a task, and their checks. Loads neither torch nor `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.plugins import Plugins
from adapters.settings import check_seed

EXAMS = ("ceval", "mmlu")
RECORDS = ("jsonl", "dolly", "alpaca", "chat", *EXAMS)
"""Tasks whose data are records of named fields; but for exams they differ in nothing but their settings."""
TASKS = ("stdlib", "text", *RECORDS)
PLUGINS = Plugins("cg_fedllm.tasks", own=lambda: TASKS)
"""What other distributions bring: functions as ``tasks.brought.Reader``, by the task's name."""

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Suffixes of files of records, in any case; all but parquet may be gzipped, as in ``.jsonl.gz``."""
TEXTS = (".txt", ".md")
TEMPLATES = ("alpaca", "chat", "none")
LOSS_ON = ("response", "all")
SYSTEM = ("keep", "merge", "drop")
ON_BAD_RECORD = ("stop", "skip")
PARTITIONS = ("iid", "dirichlet", "column", "local")
BY_COLUMN = ("dirichlet", "column")
SPLITS = ("tgap", "faf", "all")


@dataclass
class TaskSettings:
    """Which data, and how it is split."""

    name: str = "stdlib"  # stdlib | text | jsonl, dolly, alpaca, chat, ceval, mmlu, or a plug-in's: records
    path: str | None = None  # a file, a folder, or a data set's name on the hub
    template: str = "alpaca"  # of records: alpaca | chat (the tokenizer's own) | none
    loss_on: str = "all"  # all tokens count | response: of records, what is answered
    system: str = "keep"  # a dialogue's system text: keep | merge: before the first question | drop
    on_bad_record: str = "stop"  # stop: an error with file and row | skip: train on the others, and count
    packing: bool = True  # records behind each other, cut into windows; false: one record a window, padded
    window: int = 128  # tokens
    split: str = "faf"  # tgap: D1, faf: D2, all: both
    tgap_fraction: float = 0.3
    heldout_fraction: float = 0.1
    heldout_windows: int = 16  # at most this many a client are evaluated
    max_windows: int = 2048  # at most this many a client are read, held-out ones included
    partition: str = "iid"  # iid | dirichlet | column | local: one file or folder a client, path/client-0.jsonl
    partition_by: str | None = None  # dirichlet: the column to spread; column: one of its values a client
    alpha: float = 0.5  # dirichlet: smaller is less alike
    partition_seed: int = 0
    expected_records: int | None = None  # how many there are, for a dry run where the data are not here
    options: dict[str, Any] = field(default_factory=dict)  # a plug-in's own settings


def is_hub_name(path: str) -> bool:
    """Whether this can only be a data set's name on the hub, ``owner/name``, and no path."""
    named = re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", path) is not None
    return named and not format_of(path) and not is_text(path) and not Path(path).exists()


def format_of(path: str | Path) -> str:
    """The one of ``FORMATS`` that a file's name ends in, in any case, with or without ``.gz``; else the empty text."""
    name = Path(path).name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in FORMATS and not name.endswith(".parquet.gz") else ""


def is_text(path: str | Path) -> bool:
    """Whether a file of this name holds plain text."""
    return Path(path).suffix.lower() in TEXTS


def has_fields(name: str) -> bool:
    """Whether the data of this task are records of named fields, which templates render."""
    return name in RECORDS or name not in TASKS


def check_task(settings: TaskSettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if refusal := PLUGINS.refusal(settings.name, settings.options, "task", "tasks"):
        raise ValueError(refusal)
    of_a_path = settings.name in TASKS or settings.partition == "local"  # else a plug-in says what it needs
    if settings.name != "stdlib" and settings.path is None and of_a_path:
        raise ValueError(f"task.name={settings.name} needs task.path: the file or folder to read")
    choices = {
        "template": TEMPLATES,
        "loss_on": LOSS_ON,
        "system": SYSTEM,
        "on_bad_record": ON_BAD_RECORD,
        "split": SPLITS,
        "partition": PARTITIONS,
    }
    for key, values in choices.items():
        if getattr(settings, key) not in values:
            raise ValueError(f"task.{key}={getattr(settings, key)!r} is none of {', '.join(values)}")
    if settings.loss_on == "response" and not has_fields(settings.name):
        raise ValueError(f"task.loss_on=response needs records with a response, and task.name={settings.name} has none")
    if settings.name == "stdlib" and (settings.partition != "iid" or not settings.packing):
        raise ValueError("task.name=stdlib is one text a client: task.partition and task.packing cannot be changed")
    if (settings.partition_by is not None) != (settings.partition in BY_COLUMN):
        raise ValueError(
            f"task.partition_by={settings.partition_by} and task.partition={settings.partition} do not go together: "
            "dirichlet and column need a column, iid and local have none"
        )
    _check_numbers(settings)


def _check_numbers(settings: TaskSettings) -> None:
    if settings.window < 2:
        raise ValueError(f"task.window={settings.window} must be at least 2 tokens")
    for key in ("heldout_windows", "max_windows"):
        if getattr(settings, key) < 1:
            raise ValueError(f"task.{key}={getattr(settings, key)} must be at least 1")
    if not settings.alpha > 0:
        raise ValueError(f"task.alpha={settings.alpha} must be greater than 0")
    for key in ("tgap_fraction", "heldout_fraction"):
        if not 0 < getattr(settings, key) < 1:
            raise ValueError(f"task.{key}={getattr(settings, key)} must lie between 0 and 1")
    check_seed(settings.partition_seed, "task.partition_seed")


def check_window(settings: TaskSettings, max_positions: int | None) -> None:
    """Raises ValueError: a window is longer than the model can read.

    Args:
        max_positions: the model's ``max_position_embeddings``; None if it has no such limit.
    """
    if max_positions is not None and settings.window > max_positions:
        raise ValueError(f"task.window={settings.window} is more than the {max_positions} tokens that the model reads")
