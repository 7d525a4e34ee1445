"""One client's shard: its windows, split into what the codec learns from, what the model learns from, and held out.

``D1 : D2 = 3 : 7`` is the paper's split (section 3.1): TGAP records gradients on D1, federated fine-tuning (FAF) runs
on D2. The last tenth of every client's text is held out from both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.corpora import TASKS, client_texts
from tasks.windows import Tokenizer, windows_of

SPLITS = ("tgap", "faf", "all")


@dataclass
class TaskSettings:
    """Which data, and how it is split."""

    name: str = "stdlib"  # stdlib | jsonl | text
    path: str | None = None
    window: int = 128  # tokens
    split: str = "faf"  # tgap: D1, faf: D2, all: both
    tgap_fraction: float = 0.3
    heldout_fraction: float = 0.1
    heldout_windows: int = 16  # at most this many a client are evaluated
    max_windows: int = 2048  # at most this many a client are read, held-out ones included
    partition_by: str | None = None  # column for a Dirichlet partition; none: spread evenly
    alpha: float = 0.5
    partition_seed: int = 0


@dataclass(frozen=True)
class Shard:
    """One client's windows, ``[W, T]`` int64."""

    train: Tensor
    heldout: Tensor


def check_task(settings: TaskSettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if settings.name not in TASKS:
        raise ValueError(f"task.name={settings.name!r} is none of {', '.join(TASKS)}")
    if settings.name != "stdlib" and settings.path is None:
        raise ValueError(f"task.name={settings.name} needs task.path: the file or folder to read")
    if settings.split not in SPLITS:
        raise ValueError(f"task.split={settings.split!r} is none of {', '.join(SPLITS)}")
    if settings.window < 2:
        raise ValueError(f"task.window={settings.window} must be at least 2 tokens")
    for key in ("tgap_fraction", "heldout_fraction"):
        if not 0 < getattr(settings, key) < 1:
            raise ValueError(f"task.{key}={getattr(settings, key)} must lie between 0 and 1")


def load_shard(settings: TaskSettings, tokenizer: Tokenizer, client: int, num_clients: int) -> Shard:
    """One client's shard.

    Raises:
        ValueError: the client's text is too short for one training and one held-out window.
    """
    texts = client_texts(
        settings.name,
        settings.path,
        client,
        num_clients,
        partition_by=settings.partition_by,
        alpha=settings.alpha,
        seed=settings.partition_seed,
    )
    windows = windows_of(texts, tokenizer, settings.window)[: settings.max_windows]
    num_heldout = max(1, int(len(windows) * settings.heldout_fraction))
    train, heldout = windows[:-num_heldout], windows[-num_heldout:]
    shuffled = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(client))]
    num_tgap = round(len(train) * settings.tgap_fraction)
    part = {"tgap": shuffled[:num_tgap], "faf": shuffled[num_tgap:], "all": shuffled}[settings.split]
    if len(part) == 0:
        raise ValueError(
            f"client {client} of {num_clients} has {len(windows)} windows of {settings.window} tokens, none of them "
            f"in task.split={settings.split}: give it more text, fewer clients or a smaller task.window"
        )
    return Shard(part, heldout[: settings.heldout_windows])
