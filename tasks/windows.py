"""Examples -> windows: token ids of one length, the unit that clients train on and the server evaluates on.

Knows tokenizers and tensors; must not know where the text came from or who holds it.
Shapes: W windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import NamedTuple, Protocol

import torch

from adapters.windows import Windows, next_token_loss
from tasks.examples import ChatTokenizer, Example, Part

CHUNK = 100
"""Examples that are tokenised at once."""
MARGIN = 64
"""Tokens before the end of a text that has been cut, which may be others than those of the whole text."""


class Tokenizer(ChatTokenizer, Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def pad_token_id(self) -> int | None: ...
    def __call__(self, text: list[str], /, *, add_special_tokens: bool) -> dict[str, list[list[int]]]: ...


class Tokens(NamedTuple):
    """One example: ids and, for each, whether it counts."""

    ids: list[int]
    counted: list[bool]
    last: bool = True  # of its record


class Cut(NamedTuple):
    """Examples, cut into windows."""

    windows: Windows
    num_read: int  # records that are in them, whole but for what `num_cut` and `num_empty` say
    num_cut: int = 0  # examples longer than a window
    num_empty: int = 0  # examples left out, since no token that counts is left in their window


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> Windows:
    """Windows of plain texts, in which every token counts; see ``packed``."""
    return packed(tokens_of((Example([Part(text, True)]) for text in texts), tokenizer), length).windows


def tokens_of(examples: Iterable[Example], tokenizer: Tokenizer, most: int | None = None) -> Iterator[Tokens]:
    """Tokenises part by part, so that a response begins with a token of its own, as it does when it is generated.

    The tokens before a response are those of the prompt alone, as they are when it is generated. What the tokenizer
    itself begins a text with comes first, the end-of-text token last; it counts if the text before it does.

    Args:
        most: no more tokens of an example are needed than these, so that the end of a longer text need not be read;
            None: all.
    """
    opening = _opening(tokenizer)
    closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    concatenates = _concatenates(tokenizer)
    left = iter(examples)
    while chunk := list(islice(left, CHUNK)):
        if concatenates:
            tokenised = iter(_tokenised([part.text for example in chunk for part in example.parts], tokenizer, most))
        else:
            tokenised = (ids for example in chunk for ids in _continued(example.parts, tokenizer, most))
        for example in chunk:
            ids: list[int] = [] if example.complete else list(opening)
            counted = [example.parts[0].counts] * len(ids)
            for part in example.parts:
                ids += (new := next(tokenised))
                counted += [part.counts] * len(new)
            if not example.complete:
                ids += closing
                counted += [example.parts[-1].counts] * len(closing)
            yield Tokens(ids, counted, example.last)


def _tokenised(texts: Sequence[str], tokenizer: Tokenizer, most: int | None = None) -> list[list[int]]:
    """Of a text with many more than ``most`` tokens its beginning, read up to the start of a line."""
    if not texts:
        return []
    if most is None:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    size = 4 * (most + MARGIN)
    tokenised = tokenizer([_beginning(text, size) for text in texts], add_special_tokens=False)["input_ids"]
    for i, text in enumerate(texts):
        longer = size
        while longer < len(text) and len(tokenised[i]) < most + MARGIN:
            longer *= 2
            [tokenised[i]] = tokenizer([_beginning(text, longer)], add_special_tokens=False)["input_ids"]
    return tokenised


def _beginning(text: str, size: int) -> str:
    return text if len(text) <= size else text[: text.rfind("\n", 0, size) + 1 or size]


def _concatenates(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text's part are the same alone and in the text; SentencePiece begins one with a space."""
    first, second, both = _tokenised(["\n", "A", "\nA"], tokenizer)
    return first + second == both


def _continued(parts: Sequence[Part], tokenizer: Tokenizer, most: int | None) -> Iterator[list[int]]:
    """The tokens of each part as a continuation of those before it."""
    texts = list(accumulate(part.text for part in parts))
    done: list[int] = []
    for part, ids in zip(parts, _tokenised(texts, tokenizer, most if len(parts) == 1 else None), strict=True):
        if ids[: len(done)] != done:  # its first token reaches back over the part's beginning
            [mark, both] = _tokenised(["\n", "\n" + part.text], tokenizer)
            ids = done + (both[len(mark) :] if both[: len(mark)] == mark else _tokenised([part.text], tokenizer)[0])
        yield ids[len(done) :]
        done = ids


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token, if the tokenizer puts one before a text by itself."""
    [ids] = tokenizer([""], add_special_tokens=True)["input_ids"]
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def packed(examples: Iterable[Tokens], length: int, max_windows: int | None = None) -> Cut:
    """Joins the examples into one stream and cuts it into windows.

    Returns:
        At most ``max_windows`` of ``length`` tokens; those in which no token counts are left out, and so is the tail
        that does not fill a window: W may be 0. An example that goes beyond the last of ``max_windows`` is not read.
    """
    ids: list[int] = []
    counted: list[bool] = []
    num_read = 0
    most = None if max_windows is None else max_windows * length
    for example in examples:
        ids += example.ids
        counted += example.counted
        num_read += example.last and (most is None or len(ids) <= most)
        if most is not None and len(ids) >= most:
            break
    count = min(len(ids) // length, max_windows or len(ids))
    windows = Windows(
        torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length),
        torch.tensor(counted[: count * length], dtype=torch.bool).reshape(count, length),
    )
    return Cut(_counting(windows), num_read)


def padded(examples: Iterable[Tokens], tokenizer: Tokenizer, length: int) -> Cut:
    """One example a window: cut or padded to ``length`` at its end. Padding never counts."""
    tokens = list(examples)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    windows = Windows(
        torch.full((len(tokens), length), pad, dtype=torch.int64), torch.zeros(len(tokens), length, dtype=torch.bool)
    )
    for row, (ids, counted, _) in enumerate(tokens):
        windows.ids[row, : len(ids)] = torch.tensor(ids[:length])
        windows.counted[row, : len(ids)] = torch.tensor(counted[:length])
    num_cut = sum(len(example.ids) > length for example in tokens)
    kept = _counting(windows)
    return Cut(kept, sum(example.last for example in tokens), num_cut, len(windows) - len(kept))


def _counting(windows: Windows) -> Windows:
    """Those with a token that counts."""
    return windows[windows.counted[:, 1:].any(1)]


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, windows: Windows, batch_size: int = 16) -> float:
    """Mean next-token loss over all tokens that count, in nats per token. Leaves the model in evaluation mode.

    Args:
        batch_size: windows a pass; smaller needs less memory and gives the same loss, but for the rounding of floats.

    Raises:
        ValueError: there are no windows.
    """
    if len(windows) == 0:
        raise ValueError("no held-out windows: the held-out text is shorter than one window (task.window)")
    model.eval()
    device = next(model.parameters()).device
    predicted = windows.ids.shape[1] - 1
    total = 0.0
    for batch in windows.split(batch_size):
        loss = next_token_loss(model, batch.trimmed().to(device))
        total += float(loss) * (batch.num_counted / predicted)  # in full windows, a whole number where all tokens count
    return total / (windows.num_counted / predicted)
