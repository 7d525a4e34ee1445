"""The error-feedback residual on disk: what a client's last payloads left, between messages and after restarts
(``generations.py``)."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from client.generations import Generations, Kept, Kind
from conf.output import OutputError
from gradcodec.exchange import Residual
from gradcodec.layout import Layout

KEEP_DAYS = 30
"""Memory of other runs that nobody touched for so long is removed."""
COUNTS = "privacy-"
"""How files begin that count what was released of a partition (``private.py``)."""


def load_residual(folder: Path, partition: int, layout: Layout, server_round: int) -> Residual | None:
    """What the last round before ``server_round`` left of this partition, or None if there is nothing that fits."""
    kept = _generations(folder, partition, layout).load(server_round)
    return None if kept is None else Residual(kept.tensors["target"], kept.tensors["error"], kept.note)


def save_residual(folder: Path, partition: int, layout: Layout, server_round: int, residual: Residual) -> None:
    """Inverse of ``load_residual``; the last thing a client does before it replies. Its owner alone can read it.

    Raises:
        OutputError: the disk is full or cannot be written; what was there before still is.
    """
    open_folder(folder, partition)
    tensors = {"target": residual.target_RC, "error": residual.error_RC}
    _generations(folder, partition, layout).save(Kept(server_round, tensors, residual.payload_digest))


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


def _generations(folder: Path, partition: int, layout: Layout) -> Generations:
    shape = (layout.rank, layout.num_columns)
    kind = Kind("residual", layout.id.hex(), {"target": shape, "error": shape})
    return Generations(folder / f"partition-{partition}.safetensors", kind)


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
