"""A codec as the updates of a recording go through it: that of each round, with what both ends know, at one rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.frame import HEADER_BYTES
from gradcodec.layout import Layout
from gradcodec.training.recording import Recording, side_information_of


@dataclass(frozen=True)
class Coding:
    """Single updates -> payloads and back, without error feedback.

    Attributes:
        name: what the codec is called in tables.
        codecs: round -> its codec.
        sides: round -> what both ends know of it (``Codec.side_information``), or None.
        bits: a parameter; None leaves the rate to the codec.
    """

    name: str
    codecs: Mapping[int, Codec]
    sides: Mapping[int, Tensor | None]
    bits: float | None = None

    @classmethod
    def of(
        cls, name: str, codec: Codec | Mapping[int, Codec], recording: Recording, bits: float | None = None
    ) -> Coding:
        """With the side information that the recording's own rounds give; ``codec`` may be one a round."""
        codecs = codec if isinstance(codec, Mapping) else dict.fromkeys({one.round for one in recording.updates}, codec)
        sides = side_information_of(recording, next(iter(codecs.values())).side_information)
        return cls(name, codecs, sides, bits)

    @property
    def layout(self) -> Layout:
        return next(iter(self.codecs.values())).layout

    def payload(self, blocks_RC: Tensor, number: int) -> bytes:
        """Blocks of a round, encoded. Raises CodecError: the codec does not serve them, or BudgetError."""
        budget = None if self.bits is None else max_payload_bytes(self.bits, self.layout.num_parameters)
        update = self.layout.to_update(blocks_RC)
        return encode_update(update, None, codec=self.codecs[number], max_bytes=budget, side=self.sides[number])[0]

    def decoded(self, payload: bytes, number: int) -> Tensor:
        """Inverse of ``payload``, as nearly as the bytes allow, ``[R, C]``. Raises CodecError: it is refused."""
        return self.layout.to_blocks(decode_update(payload, codec=self.codecs[number], side=self.sides[number]))

    def codec_alone(self, blocks_RC: Tensor, number: int) -> Tensor:
        """What the codec makes of blocks, without the gain that a payload has beside its codes (``exchange.py``): that
        is one number which depends on the input, whatever the codec does. Raises CodecError as ``payload``."""
        most = None if self.bits is None else max_payload_bytes(self.bits, self.layout.num_parameters) - HEADER_BYTES
        codec, side = self.codecs[number], self.sides[number]
        return codec.decode(codec.encode(blocks_RC, most, side), side)

    def through(self, blocks_RC: Tensor, number: int) -> Tensor:
        """What arrives of them."""
        return self.decoded(self.payload(blocks_RC, number), number)
