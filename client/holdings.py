"""What a client holds of a federation's adapter, on its disk: between messages, and after restarts.

One file a federation (run) and partition, written whole or not at all, which names the digest of what it holds. A file
that is missing, damaged or of another layout means that nothing is held: the server is told, and sends what is needed.
"""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from client.residuals import open_folder
from conf.output import OutputError, replace_file
from gradcodec.broadcast import Held
from gradcodec.layout import Layout

_LOG = logging.getLogger(__name__)


def load_held(folder: Path, partition: int, layout: Layout, start_RC: Tensor) -> Held:
    """What this partition holds; if there is nothing that can be used, the start of a run."""
    path = _path(folder, partition)
    nothing = Held.at_start(start_RC)
    if not path.is_file():
        return nothing
    shape = [layout.rank, layout.num_columns]
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            slices = {name: file.get_slice(name) for name in ("start", "moved")}
            if any(one.get_shape() != shape or one.get_dtype() != "F32" for one in slices.values()):
                _LOG.warning("the adapter in %s is another one and is dropped", path)
                return nothing
            side = file.get_tensor("side") if "side" in names else None
            held = Held(file.get_tensor("start"), file.get_tensor("moved"), side)
            digest = (file.metadata() or {}).get("digest")
    except (SafetensorError, OSError) as error:
        _LOG.warning("the adapter in %s cannot be read and is dropped: %r", path, error)
        return nothing
    if digest != held.digest:
        _LOG.warning("the adapter in %s is damaged and is dropped", path)
        return nothing
    return held


def save_held(folder: Path, partition: int, held: Held) -> None:
    """Inverse of ``load_held``. A disk that takes nothing costs a snapshot in the next round, not this one."""
    tensors = {"start": held.start_RC.contiguous(), "moved": held.moved_RC.contiguous()}
    if held.side is not None:
        tensors["side"] = held.side.contiguous()

    def write(part: Path) -> None:
        save_file(tensors, part, {"digest": held.digest})
        part.chmod(0o600)

    try:
        open_folder(folder, partition)
        replace_file(_path(folder, partition), write)
    except OutputError as error:
        _LOG.warning("the adapter is not kept, and the server will send all of it in the next round: %s", error)


def _path(folder: Path, partition: int) -> Path:
    return folder / f"partition-{partition}.adapter.safetensors"
