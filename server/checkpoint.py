"""A run's state after a round, in one file that is written whole or not at all: what ``resume=<run>`` goes on from.

Tensors of the adapter, of the server optimizer and of the codec's side information; in the head, as JSON, settings,
round, results so far, which payload of every client was accepted last, and who failed how often.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.schema import Settings
from server.results import RunResults

NAME = "checkpoint.safetensors"
_ADAPTER, _OPTIMIZER, _SIDE = "adapter/", "optimizer/", "side"


@dataclass
class Checkpoint:
    """After ``server_round`` rounds. Clients are named by partition: node ids may change."""

    settings: Settings
    server_round: int
    adapter: dict[str, Tensor]
    results: RunResults
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    side: Tensor | None = None
    accepted: dict[int, str] = field(default_factory=dict)  # partition -> digest of its last accepted payload
    failures: dict[int, int] = field(default_factory=dict)
    resting: dict[int, int] = field(default_factory=dict)


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Replaces the one before it in the folder."""
    tensors = {_ADAPTER + name: tensor.contiguous() for name, tensor in checkpoint.adapter.items()}
    tensors |= {_OPTIMIZER + name: tensor.contiguous() for name, tensor in checkpoint.optimizer.items()}
    if checkpoint.side is not None:
        tensors[_SIDE] = checkpoint.side.contiguous()
    head = {
        "settings": checkpoint.settings.to_json(),
        "state": json.dumps(
            {
                "server_round": checkpoint.server_round,
                **checkpoint.results.state(),
                **{key: list(getattr(checkpoint, key).items()) for key in ("accepted", "failures", "resting")},
            }
        ),
    }
    part = folder / f"{NAME}.part"
    save_file(tensors, part, head)
    os.replace(part, folder / NAME)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Inverse of ``save_checkpoint``.

    Raises:
        ValueError: there is none in the folder, or it cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"resume={folder}: there is no {NAME}: the run ended before its first round, or is no run")
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        state: dict[str, Any] = json.loads(head["state"])
        settings = Settings.from_json(head["settings"])
        return Checkpoint(
            settings=settings,
            server_round=state["server_round"],
            adapter=_under(_ADAPTER, tensors),
            results=RunResults.of_state(settings, state),
            optimizer=_under(_OPTIMIZER, tensors),
            side=tensors.get(_SIDE),
            **{key: dict(map(tuple, state[key])) for key in ("accepted", "failures", "resting")},
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"resume={folder}: {path} cannot be read: {error}") from None


def _under(head: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(head): tensor for key, tensor in tensors.items() if key.startswith(head)}
