"""The error-feedback residual on disk: what a client's last payloads left, between messages and after restarts.

Two files a federation (run) and partition, each written whole or not at all and checked by a digest: what the last
round left, and what the round before it left. A server that died in a round asks for that round again; the client then
goes on from what the round before left, so that the second answer is the first one to the bit. One that was killed
while it wrote has the second file alone, and has not answered: it goes on from that. A file that cannot be read, is
damaged or belongs to another layout is dropped with a warning, and the client goes on without it: what lies before it
may have arrived, and would be sent twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.output import OutputError, replace_file
from gradcodec.exchange import Residual
from gradcodec.layout import Layout

_LOG = logging.getLogger(__name__)
KEEP_DAYS = 30
"""Memory of other runs that nobody touched for so long is removed."""
COUNTS = "privacy-"
"""How files begin that count what was released of a partition (``private.py``)."""


@dataclass(frozen=True)
class _Kept:
    server_round: int
    residual: Residual


def load_residual(folder: Path, partition: int, layout: Layout, server_round: int) -> Residual | None:
    """What the last round before ``server_round`` left of this partition, or None if there is nothing that fits."""
    last, before = _paths(folder, partition)
    kept = _read(last, layout)
    asked_again = kept is not None and kept.server_round >= server_round
    if asked_again or not last.is_file():
        kept = _read(before, layout)
    return kept.residual if kept is not None and kept.server_round < server_round else None


def save_residual(folder: Path, partition: int, layout: Layout, server_round: int, residual: Residual) -> None:
    """Inverse of ``load_residual``; the last thing a client does before it replies. Its owner alone can read it.

    Raises:
        OutputError: the disk is full or cannot be written; what was there before still is.
    """
    last, before = _paths(folder, partition)
    open_folder(folder, partition)
    target_RC, error_RC = residual.target_RC.cpu(), residual.error_RC.contiguous().cpu()
    metadata = {
        "layout": layout.id.hex(),
        "digest": residual.payload_digest,
        "round": str(server_round),
        "checksum": _checksum(target_RC, error_RC),
    }

    def write(part: Path) -> None:
        save_file({"target": target_RC, "error": error_RC}, part, metadata)
        part.chmod(0o600)

    written = last.with_suffix(".next")  # whole and on the disk before any of the other two is touched
    replace_file(written, write)
    if _round_of(last) < server_round:
        os.replace(last, before)
    os.replace(written, last)


def open_folder(folder: Path, partition: int) -> None:
    """Makes the run's folder its owner's alone, and removes what was left by others and by writers that were killed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise OutputError(f"the residual cannot be written to {folder}: {error.strerror}") from None
    for part in folder.glob(f"partition-{partition}.*part*"):
        part.unlink(missing_ok=True)
    _prune(folder)


def _read(path: Path, layout: Layout) -> _Kept | None:
    if not path.is_file():
        return None
    shape = [layout.rank, layout.num_columns]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            parts = {name: file.get_slice(name) for name in ("target", "error")}
            fits = all(one.get_shape() == shape and one.get_dtype() == "F32" for one in parts.values())
            if not fits or metadata.get("layout") != layout.id.hex():  # before memory is taken for what it holds
                _LOG.warning("the residual in %s is of another model or adapter and is dropped", path)
                return None
            target_RC, error_RC = file.get_tensor("target"), file.get_tensor("error")
        kept = _Kept(int(metadata["round"]), Residual(target_RC, error_RC, metadata["digest"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        _LOG.warning("the residual in %s cannot be read and is dropped: %r", path, error)
        return None
    if metadata.get("checksum") != _checksum(target_RC, error_RC):
        _LOG.warning("the residual in %s is damaged and is dropped", path)
        return None
    return kept


def _round_of(path: Path) -> float:
    """Of the file's head alone; infinite if there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["round"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return math.inf


def _checksum(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _paths(folder: Path, partition: int) -> tuple[Path, Path]:
    """Files of the last round and of the round before."""
    return folder / f"partition-{partition}.safetensors", folder / f"partition-{partition}.before.safetensors"


def _prune(folder: Path) -> None:
    """Removes what other runs left long ago."""
    oldest = time.time() - KEEP_DAYS * 86400
    with contextlib.suppress(OSError):
        for other in folder.parent.iterdir():
            files = list(other.glob("partition-*")) if other.is_dir() and other != folder else []
            if files and max(file.stat().st_mtime for file in files) < oldest:
                _empty(other)


def _empty(folder: Path) -> None:
    """Keeps what a budget is counted by: the run may be taken up again."""
    for file in folder.iterdir():
        if not file.name.startswith(COUNTS):
            file.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
