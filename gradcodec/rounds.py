"""The codec of every round: one and the same, or one that follows the global adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from gradcodec.broadcast import Held
from gradcodec.codec import Codec
from gradcodec.layout import Layout
from gradcodec.learned.basis import Prior
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.tables import LearnedTables


class Codecs(Protocol):
    """What both ends ask for the codec of a round."""

    def at(self, adapter: Mapping[str, Tensor]) -> Codec:
        """The codec of the round that starts from this global adapter, PEFT tensor name -> tensor; the same on every
        machine, to rounding."""
        ...

    def tables_at(self, adapter: Mapping[str, Tensor]) -> LearnedTables | None:
        """The tables of that round's codec, its directions among them; None: it has none."""
        ...


CodecAt = Callable[[Held], Codec]
"""The codec of the round that starts from what is held."""


def codec_at(codecs: Codecs, layout: Layout) -> CodecAt:
    """The same, asked by what is held."""
    return lambda held: codecs.at(layout.to_update(held.adapter_RC))


class SameCodec:
    """One codec for all rounds."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def at(self, adapter: Mapping[str, Tensor]) -> Codec:
        return self.codec

    def tables_at(self, adapter: Mapping[str, Tensor]) -> LearnedTables | None:
        return self.codec.tables if isinstance(self.codec, LearnedCodec) else None


class DerivedCodecs:
    """The learned codec, its directions derived from the base model and from how the global adapter moved."""

    def __init__(self, codec: LearnedCodec, priors: Mapping[str, Prior], start: Mapping[str, Tensor] | None) -> None:
        """
        Args:
            codec: built from an artifact, whose tables are used.
            priors: by block name, what the base model says.
            start: the adapter that both ends can make on their own; None: they cannot, and only priors count.
        """
        self._codec = codec
        self._priors = priors
        self._start_RC = None if start is None else codec.layout.to_blocks(start).cpu()
        self._last: tuple[Tensor | None, LearnedCodec] | None = None

    def at(self, adapter: Mapping[str, Tensor]) -> Codec:
        moved_RC = self._moved(adapter)
        if self._last is not None and _equal(self._last[0], moved_RC):  # a round's payloads have one
            return self._last[1]
        self._last = None  # its directions' memory is needed
        self._last = moved_RC, self._codec.starting_from(self._priors, moved_RC)
        return self._last[1]

    def tables_at(self, adapter: Mapping[str, Tensor]) -> LearnedTables:
        return self._codec.tables_from(self._priors, self._moved(adapter))

    def _moved(self, adapter: Mapping[str, Tensor]) -> Tensor | None:
        return None if self._start_RC is None else self._codec.layout.to_blocks(adapter).cpu() - self._start_RC


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
