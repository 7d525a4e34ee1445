"""The error-feedback residual on disk: what a client's last payload left, between messages and after restarts.

One file a federation (run) and partition, written whole or not at all. A file that cannot be read or belongs to
another layout is dropped with a warning: the client then goes on without the old residual.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gradcodec.exchange import Residual
from gradcodec.layout import Layout

_LOG = logging.getLogger(__name__)


def load_residual(folder: Path, partition: int, layout: Layout) -> Residual | None:
    """The residual of this partition, or None if there is none that fits."""
    path = _path(folder, partition)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            residual = Residual(file.get_tensor("target"), file.get_tensor("left"), metadata.get("digest", ""))
    except (SafetensorError, OSError) as error:
        _LOG.warning("the residual in %s cannot be read and is dropped: %s", path, error)
        return None
    if metadata.get("layout") != layout.id.hex():
        _LOG.warning("the residual in %s is of another model or adapter and is dropped", path)
        return None
    return residual


def save_residual(folder: Path, partition: int, layout: Layout, residual: Residual) -> None:
    """Inverse of ``load_residual``; the last thing a client does before it replies."""
    path = _path(folder, partition)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part{os.getpid()}")
    metadata = {"layout": layout.id.hex(), "digest": residual.payload_digest}
    save_file({"target": residual.target_RC, "left": residual.left_RC.contiguous()}, part, metadata)
    os.replace(part, path)


def _path(folder: Path, partition: int) -> Path:
    return folder / f"partition-{partition}.safetensors"
