"""Several processes, each with a GPU of its own, that train one adapter together: data parallel.

Every process holds the whole model and takes its share of a step's micro-batches; gradients are added up over all of
them, so that every process takes the same step (Li et al. 2020, "PyTorch Distributed", section 3). torchrun starts the
processes. Knows ``torch.distributed``; must not know models.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
_FOREVER = timedelta(days=365)
"""Between two messages a team waits for as long as it takes; if one of it dies, torchrun ends the others."""


@dataclass(frozen=True)
class Team:
    """This process's place in it; alone it is a team of one, which sends nothing."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_torchrun(cls) -> Team:
        """As torchrun's environment says, joined; without one, a team of one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=_FOREVER)
        else:
            dist.init_process_group("gloo", timeout=_FOREVER)
        return cls(dist.get_rank(), size)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of what all have."""
        return items[self.rank :: self.size]

    def add_up(self, parameters: Sequence[torch.nn.Parameter], loss: float) -> float:
        """Gradients become their sums over the team, in place; gives the sum of the losses."""
        if self.size == 1:
            return loss
        for parameter in parameters:
            if parameter.grad is None:  # there were fewer micro-batches than processes
                parameter.grad = torch.zeros_like(parameter)
        values = [*(p.grad.flatten() for p in parameters if p.grad is not None), parameters[0].new_tensor([loss])]
        sums: Tensor = torch.cat(values)
        dist.all_reduce(sums)
        pieces = sums.split([value.numel() for value in values])
        for parameter, piece in zip(parameters, pieces, strict=False):
            parameter.grad = piece.view_as(parameter)
        return float(pieces[-1])

    def tell(self, content: bytes) -> None:
        """From the first process to all others, as bytes: nothing is unpickled."""
        if self.size > 1:
            dist.broadcast(torch.tensor([len(content)]), 0)
            dist.broadcast(torch.frombuffer(bytearray(content + b"\0"), dtype=torch.uint8), 0)  # never empty

    def told(self) -> bytes:
        """Inverse of ``tell``, on the others."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0)
        content = torch.empty(int(size) + 1, dtype=torch.uint8)
        dist.broadcast(content, 0)
        return content.numpy().tobytes()[:-1]
