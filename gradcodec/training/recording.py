"""A recording of updates: rounds, clients, blocks; split into what a codec trains on and what it is tried on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.fidelity import inner_product
from gradcodec.files import replace_file
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout, Rows

_PARTS = "parts"
_KEY = re.compile(r"r([0-9]{1,9})/c([0-9]{1,9})/(.+)")
_FLOATS = ("F16", "BF16", "F32", "F64")
_MOST_PADDING = 64
"""Blocks of few rows stand in a matrix of the highest rank: what that may cost, in sizes of the update."""


@dataclass(frozen=True)
class Update:
    """One client's update in one round, as blocks ``[R, C]``."""

    round: int
    client: int
    blocks_RC: Tensor


@dataclass(frozen=True)
class Recording:
    """Updates of one layout, by round and client."""

    layout: Layout
    updates: tuple[Update, ...]

    @property
    def exchanged_bytes(self) -> int:
        """What making it took: every update up in float32, and down the adapter that it started from."""
        return 2 * 4 * self.layout.num_parameters * len(self.updates)

    def mean_of_round(self, number: int) -> Tensor | None:
        """The global update of a round, ``[R, C]``; None if it was not recorded."""
        blocks = [update.blocks_RC for update in self.updates if update.round == number]
        return torch.stack(blocks).mean(0) if blocks else None

    def moved_before(self, number: int) -> Tensor | None:
        """The sum of the global updates of all rounds before, ``[R, C]``; None in the first round."""
        means = [self.mean_of_round(earlier) for earlier in range(1, number)]
        known = [mean for mean in means if mean is not None]
        return torch.stack(known).sum(0) if known else None

    @property
    def rounds(self) -> list[int]:
        """Those that are recorded, ascending."""
        return sorted({update.round for update in self.updates})

    def first_third(self) -> tuple[list[Update], list[Update]]:
        """Updates of the first third of the rounds, one at least, and those of the rest."""
        rounds = self.rounds
        early = set(rounds[: max(1, len(rounds) // 3)])
        train = [update for update in self.updates if update.round in early]
        return train, [update for update in self.updates if update.round not in early]

    def split(self, heldout_rounds: int, heldout_clients: int) -> tuple[list[Update], dict[str, list[Update]]]:
        """Training updates; and by name those held out: later rounds, other clients, both.

        Raises:
            ValueError: nothing would be left to train on.
        """
        if heldout_rounds < 0 or heldout_clients < 0:
            raise ValueError(
                f"heldout_rounds={heldout_rounds} and heldout_clients={heldout_clients} must be at least 0"
            )
        rounds = self.rounds
        clients = sorted({update.client for update in self.updates})
        late = set(rounds[max(0, len(rounds) - heldout_rounds) :])
        others = set(clients[max(0, len(clients) - heldout_clients) :])
        parts: dict[tuple[bool, bool], list[Update]] = {}
        for update in self.updates:
            parts.setdefault((update.round in late, update.client in others), []).append(update)
        train = parts.get((False, False), [])
        if not train:
            raise ValueError(
                f"heldout_rounds={heldout_rounds} and heldout_clients={heldout_clients} leave nothing to train on: "
                f"{len(rounds)} rounds and {len(clients)} clients are recorded"
            )
        heldout = {"later rounds": (True, False), "other clients": (False, True), "both": (True, True)}
        return train, {name: parts[key] for name, key in heldout.items() if key in parts}


def save_recording(
    updates: Mapping[tuple[int, int], Mapping[str, Tensor]], parts: Mapping[str, Mapping[str, Rows]], path: Path
) -> None:
    """Writes updates by round and client under ``r<round>/c<client>/<PEFT tensor name>``, whole or not at all; the
    parts of the layout go into the file's metadata.

    Raises:
        ValueError: the file cannot be written.
    """
    tensors = {f"r{r}/c{c}/{name}": tensor for (r, c), update in updates.items() for name, tensor in update.items()}
    runs = {
        name: {part: [[run.start, run.stop, run.step] for run in rows] for part, rows in split.items()}
        for name, split in parts.items()
    }
    try:
        replace_file(path, lambda part: save_file(tensors, part, {_PARTS: json.dumps(runs)}))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"recording {path} cannot be written: {error}") from None


def load_recording(path: Path) -> Recording:
    """Inverse of ``save_recording``; a file without metadata has no parts. Names, types and sizes are checked before
    memory is taken for values.

    Raises:
        ValueError: no such file, a key of another form, or updates that are not all of the same finite float tensors.
    """
    if not path.is_file():
        raise ValueError(f"recording {path} is no file")
    try:
        with safe_open(path, framework="pt") as file:
            keys = _checked_keys(path, file)
            first = next(iter(keys.values()))
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in first.items()}
            layout = _layout(path, shapes, (file.metadata() or {}).get(_PARTS, "{}"))
            updates = [
                Update(r, c, _blocks(path, layout, {name: file.get_tensor(key) for name, key in names.items()}))
                for (r, c), names in sorted(keys.items())
            ]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"recording {path} is no safetensors file: {error}") from None
    return Recording(layout, tuple(updates))


_Keys = dict[tuple[int, int], dict[str, str]]
"""Round and client -> tensor name -> its key in the file."""


def _checked_keys(path: Path, file: Any) -> _Keys:
    """From the file's header alone."""
    found: _Keys = {}
    shapes: dict[str, list[int]] = {}
    for key in file.keys():  # noqa: SIM118 (the file is no dict)
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"recording {path} has key {key[:200]!r}: r<round>/c<client>/<tensor name> is expected")
        about = file.get_slice(key)
        if about.get_dtype() not in _FLOATS:
            raise ValueError(f"recording {path}: {key!r} is of type {about.get_dtype()}, none of {', '.join(_FLOATS)}")
        if about.get_shape() != shapes.setdefault(match[3], about.get_shape()):
            raise ValueError(
                f"recording {path}: {key!r} has shape {about.get_shape()}, others of that name {shapes[match[3]]}"
            )
        found.setdefault((int(match[1]), int(match[2])), {})[match[3]] = key
    if not found:
        raise ValueError(f"recording {path} is empty")
    for (r, c), names in found.items():
        if lacking := sorted(shapes.keys() - names.keys()):
            raise ValueError(f"recording {path}: the update of round {r}, client {c} lacks tensor {lacking[0]!r}")
    return found


def _layout(path: Path, shapes: Mapping[str, tuple[int, ...]], parts: str) -> Layout:
    try:
        layout = Layout.of(shapes, _parts(parts))
    except CodecError as error:
        raise ValueError(f"recording {path}: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"recording {path} says of its fused tensors what cannot be read: {error!r}") from None
    if layout.rank * layout.num_columns > _MOST_PADDING * layout.num_parameters:
        raise ValueError(
            f"recording {path} has factors of rank 1 to {layout.rank}: side by side they would take more than "
            f"{_MOST_PADDING} times their size"
        )
    return layout


def _parts(text: str) -> dict[str, dict[str, Rows]]:
    return {
        name: {part: tuple(range(*run) for run in rows) for part, rows in split.items()}
        for name, split in json.loads(text).items()
    }


def _blocks(path: Path, layout: Layout, update: Mapping[str, Tensor]) -> Tensor:
    blocks_RC = layout.to_blocks(update)
    if not math.isfinite(inner_product(blocks_RC, blocks_RC)):
        raise ValueError(f"recording {path} holds NaN, infinity or values whose squares are infinite")
    return blocks_RC


def side_information_of(
    recording: Recording, side_information: Callable[[Tensor], Tensor | None] | None = None
) -> dict[int, Tensor | None]:
    """Per round what a codec may know of it: side information from the global update of the round before; without a
    function that of ``learned``, principal axes."""
    side_information = side_information or partial(principal_axes, layout=recording.layout)
    found: dict[int, Tensor | None] = {}
    for number in {update.round for update in recording.updates}:
        before = recording.mean_of_round(number - 1)
        found[number] = None if before is None else side_information(before)
    return found
