"""A recording of updates: rounds, clients, blocks; split into what a codec trains on and what it is tried on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradcodec.layout import Layout, Rows

_PARTS = "parts"
_KEY = re.compile(r"r(\d+)/c(\d+)/(.+)")


@dataclass(frozen=True)
class Update:
    """One client's update in one round, as blocks ``[R, C]``."""

    round: int
    client: int
    blocks_RC: Tensor


@dataclass(frozen=True)
class Recording:
    layout: Layout
    updates: tuple[Update, ...]

    def mean_of_round(self, number: int) -> Tensor | None:
        """The global update of a round, ``[R, C]``; None if it was not recorded."""
        blocks = [update.blocks_RC for update in self.updates if update.round == number]
        return torch.stack(blocks).mean(0) if blocks else None

    def split(self, heldout_rounds: int, heldout_clients: int) -> tuple[list[Update], dict[str, list[Update]]]:
        """Training updates; and by name those held out: later rounds, other clients, both.

        Raises:
            ValueError: nothing would be left to train on.
        """
        if heldout_rounds < 0 or heldout_clients < 0:
            raise ValueError("tgap.heldout_rounds and tgap.heldout_clients must be at least 0")
        rounds = sorted({update.round for update in self.updates})
        clients = sorted({update.client for update in self.updates})
        late = set(rounds[max(0, len(rounds) - heldout_rounds) :])
        others = set(clients[max(0, len(clients) - heldout_clients) :])
        parts: dict[tuple[bool, bool], list[Update]] = {}
        for update in self.updates:
            parts.setdefault((update.round in late, update.client in others), []).append(update)
        train = parts.get((False, False), [])
        if not train:
            raise ValueError(
                f"{len(rounds)} rounds and {len(clients)} clients are recorded: "
                "tgap.heldout_rounds and tgap.heldout_clients leave nothing to train on"
            )
        heldout = {"later rounds": (True, False), "other clients": (False, True), "both": (True, True)}
        return train, {name: parts[key] for name, key in heldout.items() if key in parts}


def save_recording(
    updates: Mapping[tuple[int, int], Mapping[str, Tensor]], parts: Mapping[str, Mapping[str, Rows]], path: Path
) -> None:
    """Writes updates by round and client under ``r<round>/c<client>/<PEFT tensor name>``, whole or not at all; the
    parts of the layout go into the file's metadata."""
    tensors = {f"r{r}/c{c}/{name}": tensor for (r, c), update in updates.items() for name, tensor in update.items()}
    runs = {
        name: {part: [[run.start, run.stop, run.step] for run in rows] for part, rows in split.items()}
        for name, split in parts.items()
    }
    unfinished = path.with_name(path.name + ".part")
    save_file(tensors, unfinished, {_PARTS: json.dumps(runs)})
    os.replace(unfinished, path)


def load_recording(path: Path) -> Recording:
    """Inverse of ``save_recording``; a file without metadata has no parts.

    Raises:
        ValueError: no such file, a key of another form, or an update that lacks a tensor.
    """
    if not path.is_file():
        raise ValueError(f"recording {path} is no file: make one with `python -m tgap record=FILE`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no dict)
    except SafetensorError as error:
        raise ValueError(f"recording {path} is no safetensors file: {error}") from None
    updates: dict[tuple[int, int], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"recording {path} has key {key!r}: r<round>/c<client>/<tensor name> is expected")
        updates.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
    if not updates:
        raise ValueError(f"recording {path} is empty")
    layout = Layout.of(_shapes(next(iter(updates.values()))), _parts(path, metadata.get(_PARTS, "{}")))
    return Recording(
        layout, tuple(Update(r, c, layout.to_blocks(update)) for (r, c), update in sorted(updates.items()))
    )


def _shapes(update: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in update.items()}


def _parts(path: Path, text: str) -> dict[str, dict[str, Rows]]:
    try:
        return {
            name: {part: tuple(range(*run) for run in rows) for part, rows in split.items()}
            for name, split in json.loads(text).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"recording {path} says of its fused tensors what cannot be read: {error!r}") from None
