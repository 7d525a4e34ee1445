"""A run's state after a round, in one file that is written whole or not at all: what ``resume=<run>`` goes on from.

The file is safetensors: the adapter, what the strategies remember as tensors, and everything else as JSON in a tensor
of bytes (a header of safetensors ends at 100 MB, and a run's uplinks do not). Its metadata holds a format number and a
SHA-256 digest over all that: a damaged file is refused. The checkpoint before the last is kept, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.output import replace_file
from conf.schema import NONE, Settings
from gradcodec.state import State
from server.records.results import RunResults

NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
_FORMAT = "2"
_ADAPTER, _BEST, _STRATEGY, _REST = "adapter/", "best/", "strategy/", "rest"
MAX_BYTES = 1 << 38


@dataclass
class Checkpoint:
    """After ``server_round`` rounds."""

    settings: Settings
    server_round: int
    adapter: dict[str, Tensor]
    results: RunResults
    strategy: State = field(default_factory=State)
    best: dict[str, Tensor] | None = None  # the adapter of the best round that was evaluated; None: it is not kept


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Replaces the one before it in the folder, which becomes the previous one.

    Raises:
        OutputError: the disk is full or cannot be written; both that were there still are.
    """
    rest = {
        "settings": checkpoint.settings.to_json(),
        "server_round": checkpoint.server_round,
        "results": checkpoint.results.state(),
        "strategy": checkpoint.strategy.values,
    }
    tensors = {_ADAPTER + name: tensor.contiguous() for name, tensor in checkpoint.adapter.items()}
    tensors |= {_STRATEGY + name: tensor.contiguous() for name, tensor in checkpoint.strategy.tensors.items()}
    tensors |= {_BEST + name: tensor.contiguous().clone() for name, tensor in (checkpoint.best or {}).items()}
    tensors[_REST] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    metadata = {"format": _FORMAT, "sha256": _digest(tensors)}

    def write(part: Path) -> None:
        save_file(tensors, part, metadata)
        _keep_previous(folder)

    replace_file(folder / NAME, write)


def load_checkpoint(folder: Path, from_round: int | None = None) -> Checkpoint:
    """Inverse of ``save_checkpoint``.

    Args:
        from_round: that of the two that are kept which was written after this round; None: the last one.

    Raises:
        ValueError: there is none in the folder, none of that round, or it cannot be read.
    """
    found = [folder / name for name in (NAME, PREVIOUS) if (folder / name).is_file()]
    if not found:
        raise ValueError(f"resume={folder}: there is no {NAME}: the run ended before its first round, or is no run")
    if from_round is None:
        return _read(found[0], folder)
    checkpoints = [_read(path, folder) for path in found]
    for checkpoint in checkpoints:
        if checkpoint.server_round == from_round:
            return checkpoint
    rounds = sorted({checkpoint.server_round for checkpoint in checkpoints})
    raise ValueError(f"resume={folder} from_round={from_round}: checkpoints are kept of rounds {rounds}")


def go_back(folder: Path, server_round: int) -> None:
    """Makes the checkpoint of this round the last one, if it is the previous one; the one after it is gone."""
    if (folder / PREVIOUS).is_file() and _read(folder / PREVIOUS, folder).server_round == server_round:
        os.replace(folder / PREVIOUS, folder / NAME)


def _keep_previous(folder: Path) -> None:
    """The last one under the name of the previous one as well: at no moment is there none."""
    last, part = folder / NAME, folder / f"{PREVIOUS}.part"
    if not last.is_file():
        return
    part.unlink(missing_ok=True)
    try:
        os.link(last, part)
    except OSError:  # a file system without links
        shutil.copyfile(last, part)
    os.replace(part, folder / PREVIOUS)


def _read(path: Path, folder: Path) -> Checkpoint:
    """Raises ValueError: the file is damaged, or no checkpoint of this version."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it takes more than {MAX_BYTES} bytes")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError("it is damaged, or of another version of this program")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        if metadata.get("sha256") != _digest(tensors):
            raise ValueError("its digest does not match: it is damaged")
        return _checkpoint_of(tensors)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or repr(error)
        raise ValueError(f"resume={folder}: {path} cannot be read: {reason}{_instead(path)}") from None


def _checkpoint_of(tensors: dict[str, Tensor]) -> Checkpoint:
    """Raises one of many errors: a right digest says nothing of what is in it."""
    rest: Any = json.loads(tensors.pop(_REST).numpy().tobytes())
    for name, tensor in tensors.items():
        is_bytes = tensor.dtype == torch.uint8 and name.startswith(_STRATEGY)
        if not is_bytes and (tensor.dtype != torch.float32 or not bool(tensor.isfinite().all())):
            raise ValueError("a tensor of it is not float32, or not finite")
    settings, server_round, values = Settings.from_json(rest["settings"]), rest["server_round"], rest["strategy"]
    if type(server_round) is not int or server_round < 1 or not isinstance(values, dict):
        raise ValueError("round or strategy's state are of the wrong type")
    results = RunResults.of_state(settings, rest["results"])
    known = (0,) if settings.server.base == NONE else (server_round, server_round + 1)
    if len(results.heldout_loss) not in known:
        raise ValueError(f"{len(results.heldout_loss)} held-out losses do not belong to round {server_round}")
    strategy = State(values, _under(_STRATEGY, tensors))
    best = _under(_BEST, tensors) or None
    return Checkpoint(settings, server_round, _under(_ADAPTER, tensors), results, strategy, best)


def _instead(path: Path) -> str:
    before = path.with_name(PREVIOUS)
    if path.name != NAME or not before.is_file():
        return ""
    return f" (the one before it is {before.name}: rename it to {NAME} to go on from there)"


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _under(head: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(head): tensor for key, tensor in tensors.items() if key.startswith(head)}
