"""The layers that stay on the node (``lora.local``): what the last rounds trained of them, between messages and after
restarts (``generations.py``)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from adapters.finetune import DivergedError
from client.generations import Generations, Kept, Kind
from client.residuals import open_folder


def load_local(folder: Path, partition: int, start: Mapping[str, Tensor], server_round: int) -> Mapping[str, Tensor]:
    """What the last round before ``server_round`` left of this partition; ``start`` if there is nothing that fits.

    Args:
        folder: of the run.
        partition: whose layers they are.
        start: PEFT tensor name -> what the run's seed makes of it, float32.
        server_round: that is trained, or the one after what is evaluated.
    """
    kept = _generations(folder, partition, start).load(server_round)
    return start if kept is None else kept.tensors


def save_local(folder: Path, partition: int, local: Mapping[str, Tensor], server_round: int) -> None:
    """Inverse of ``load_local``.

    Raises:
        DivergedError: they hold NaN or infinity, from which no later round would recover; what was there still is.
        OutputError: the disk is full or cannot be written.
    """
    if broken := next((name for name, tensor in local.items() if not bool(tensor.isfinite().all())), None):
        raise DivergedError(f"training diverged: {broken!r}, which stays on this node, is not finite: lower train.lr")
    open_folder(folder, partition)
    _generations(folder, partition, local).save(Kept(server_round, local, ""))


def read_local(folder: Path, partition: int) -> dict[str, Tensor]:
    """What the last round left, whatever round and layers that are. Raises ValueError: nothing, or it is damaged."""
    file = local_file(folder, partition)
    if not file.is_file():
        raise ValueError(f"{folder} holds no layers of partition {partition}: another --memory, --run or --partition?")
    try:
        tensors = dict(sorted(load_file(file).items()))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if _generations(folder, partition, tensors).load(sys.maxsize) is None:
        raise ValueError(f"{file} is damaged")
    return tensors


def local_file(folder: Path, partition: int) -> Path:
    """Of the last round."""
    return folder / f"partition-{partition}.local.safetensors"


def _generations(folder: Path, partition: int, like: Mapping[str, Tensor]) -> Generations:
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(like.items())}
    layout = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return Generations(local_file(folder, partition), Kind("layers of this node", layout, shapes))
