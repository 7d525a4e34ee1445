"""Tensors that a client keeps from round to round: what the last round left, and what the round before it left.

Two files, each written whole or not at all and checked by a digest. A server that died in a round asks for that round
again; the client then goes on from what the round before left, so that the second answer is the first one to the bit.
One that was killed while it wrote has the second file alone, and has not answered: it goes on from that. A file that
cannot be read, is damaged or belongs to another layout is dropped with a warning, and the client goes on without it:
what lies before it may have arrived, and would be sent twice.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from conf.output import replace_file

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """What is kept: its name in warnings, and what tells it from the same of another model or adapter."""

    name: str
    layout: str
    shapes: Mapping[str, tuple[int, ...]]  # tensor name -> shape, float32


@dataclass(frozen=True)
class Kept:
    """What one round left."""

    server_round: int
    tensors: Mapping[str, Tensor]
    note: str  # whatever its owner wrote beside it


@dataclass(frozen=True)
class Generations:
    """Of one partition in one run, in the run's folder."""

    last: Path
    kind: Kind

    @property
    def before(self) -> Path:
        """The file of the round before the last."""
        return self.last.with_suffix(".before.safetensors")

    def load(self, server_round: int) -> Kept | None:
        """What the last round before ``server_round`` left, or None if there is nothing that fits."""
        kept = self._read(self.last)
        asked_again = kept is not None and kept.server_round >= server_round
        if asked_again or not self.last.is_file():
            kept = self._read(self.before)
        if kept is None or kept.server_round < server_round:
            return kept
        if server_round > 1:
            _LOG.warning(
                "nothing of the %s from before round %d is kept any more, and round %d is asked for again: this client "
                "begins anew there",
                *(self.kind.name, kept.server_round, server_round),
            )
        return None

    def save(self, kept: Kept) -> None:
        """Inverse of ``load``. Their owner alone can read the files, whose folder is there.

        Raises:
            OutputError: the disk is full or cannot be written; what was there before still is.
        """
        tensors = {name: kept.tensors[name].contiguous().cpu() for name in self.kind.shapes}
        metadata = {
            "layout": self.kind.layout,
            "digest": kept.note,
            "round": str(kept.server_round),
            "checksum": _checksum(tensors),
        }

        def write(part: Path) -> None:
            save_file(tensors, part, metadata)
            part.chmod(0o600)

        written = self.last.with_suffix(".next")  # whole and on the disk before any of the other two is touched
        replace_file(written, write)
        if _round_of(self.last) < kept.server_round:
            os.replace(self.last, self.before)
        os.replace(written, self.last)

    def _read(self, path: Path) -> Kept | None:
        if not path.is_file():
            return None
        what, shapes = self.kind.name, self.kind.shapes
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                parts = {name: file.get_slice(name) for name in shapes}
                fits = all(
                    tuple(part.get_shape()) == shapes[name] and part.get_dtype() == "F32"
                    for name, part in parts.items()
                )
                if not fits or metadata.get("layout") != self.kind.layout:  # before memory is taken for what it holds
                    _LOG.warning("the %s in %s is of another model or adapter and is dropped", what, path)
                    return None
                tensors = {name: file.get_tensor(name) for name in shapes}
            kept = Kept(int(metadata["round"]), tensors, metadata["digest"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            _LOG.warning("the %s in %s cannot be read and is dropped: %r", what, path, error)
            return None
        if metadata.get("checksum") != _checksum(tensors):
            _LOG.warning("the %s in %s is damaged and is dropped", what, path)
            return None
        return kept


def _round_of(path: Path) -> float:
    """Of the file's head alone; infinite if there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["round"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return math.inf


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
