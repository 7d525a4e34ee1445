"""What a client remembers between messages and after restarts, on its disk (``gradcodec.client.Memory``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from client.holdings import load_held, save_held
from client.residuals import load_residual, save_residual
from gradcodec.broadcast import Held
from gradcodec.exchange import Residual
from gradcodec.layout import Layout


@dataclass(frozen=True)
class DiskMemory:
    """Of one partition in one run, whose folder it is."""

    folder: Path
    partition: int

    def load_held(self, layout: Layout, start_RC: Tensor) -> Held:
        return load_held(self.folder, self.partition, layout, start_RC)

    def save_held(self, held: Held) -> None:
        save_held(self.folder, self.partition, held)

    def load_residual(self, layout: Layout, server_round: int) -> Residual | None:
        return load_residual(self.folder, self.partition, layout, server_round)

    def save_residual(self, layout: Layout, server_round: int, residual: Residual) -> None:
        save_residual(self.folder, self.partition, layout, server_round, residual)
