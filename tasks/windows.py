"""Text -> windows: token ids cut to one length, the unit that clients train on and the server evaluates on.

Knows tokenizers and tensors; must not know where the text came from or who holds it.
Shapes: W windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from adapters.finetune import next_token_loss


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def eos_token_id(self) -> int | None: ...
    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> dict[str, list[list[int]]]: ...


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Tensor:
    """Tokenises texts, joins them with the end-of-text token and cuts the stream into windows.

    Returns:
        ``[W, T]`` int64 with ``T = length``; the tail that does not fill a window is dropped, so W may be 0.
    """
    stream: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if texts:
        for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
            stream.extend(ids)
            stream.extend(separator)
    count = len(stream) // length
    return torch.tensor(stream[: count * length], dtype=torch.int64).reshape(count, length)


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, windows: Tensor, batch_size: int = 16) -> float:
    """Mean next-token loss over windows, in nats per token. Leaves the model in evaluation mode.

    Raises:
        ValueError: there are no windows.
    """
    if len(windows) == 0:
        raise ValueError("no held-out windows: the held-out text is shorter than one window (task.window)")
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for batch in windows.split(batch_size):
        batch = batch.to(device)
        total += float(next_token_loss(model, batch)) * len(batch)
    return total / len(windows)
