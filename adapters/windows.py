"""Windows of tokens, and the loss of a model on them.

In a module of their own, which loads torch alone: what deals with text needs no model.
Shapes: W windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""The label of a token that does not count; ``cross_entropy`` leaves it out."""


@dataclass(frozen=True)
class Windows:
    """What is trained and evaluated on: token ids, and which of them count in the loss.

    A window is padded behind its last token, so a causal model never sees the padding from a token that counts, and no
    attention mask is needed.
    """

    ids: Tensor  # [W, T] int64
    counted: Tensor  # [W, T] bool; the first token of a window is never predicted and never counts

    @classmethod
    def whole(cls, ids: Tensor) -> Windows:
        """Windows of ``[W, T]`` ids in which every token counts."""
        return cls(ids, torch.ones_like(ids, dtype=torch.bool))

    @classmethod
    def cat(cls, parts: Sequence[Windows]) -> Windows:
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.counted for part in parts]))

    @property
    def labels(self) -> Tensor:
        """``[W, T]`` int64: the id where a token counts, else ``IGNORED``."""
        return self.ids.where(self.counted, IGNORED)

    @property
    def num_counted(self) -> int:
        return int(self.counted[:, 1:].sum())

    def trimmed(self) -> Windows:
        """Without the columns behind the last token that counts: what follows a token does not change its loss."""
        length = int(self.counted.any(0).nonzero().max()) + 1
        return Windows(self.ids[:, :length], self.counted[:, :length])

    def split(self, size: int) -> Iterator[Windows]:
        for ids, counted in zip(self.ids.split(size), self.counted.split(size), strict=True):
            yield Windows(ids, counted)

    def to(self, device: torch.device) -> Windows:
        return Windows(self.ids.to(device), self.counted.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(self.ids[rows], self.counted[rows])

    def __len__(self) -> int:
        return len(self.ids)


def next_token_loss(model: torch.nn.Module, windows: Windows) -> Tensor:
    """Mean cross-entropy of the tokens that count, each given those before it, in nats per token.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        windows: on the model's device, with at least one token that counts.
    """
    logits = model(input_ids=windows.ids, use_cache=False).logits  # no cache: it would copy every key and value
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), windows.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def window_losses(model: torch.nn.Module, windows: Windows) -> Tensor:
    """The same of every window by itself, ``[W]``: in each at least one token counts."""
    logits = model(input_ids=windows.ids, use_cache=False).logits
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), windows.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(len(windows), -1).sum(1) / windows.counted[:, 1:].sum(1)
