"""The interface that every codec has, and the one that loses nothing.

Codecs see blocks (``layout.py``), which may lie on any device, and codes (``frame.py``). They know neither files nor
federations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout


class Codec(Protocol):
    """Blocks <-> codes for one layout.

    ``decode`` gives float32 blocks ``[R, C]`` or raises ``CodecError``, whatever the codes hold. Both ends must
    build the codec with equal settings and weights (equal ``id``) and hand it the same side information.
    """

    @property
    def id(self) -> bytes:
        """4 bytes: digest of the codec's kind, settings and weights."""
        ...

    @property
    def layout(self) -> Layout: ...

    @property
    def num_streams(self) -> int:
        """How many streams its codes have."""
        ...

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """What both ends may know of the next updates from the last global one, ``[R, C]``: computed once, on the
        server, and sent to the clients, or on both ends, which compare a sketch (``broadcast.py``). None: nothing."""
        ...

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        """Blocks -> codes.

        Args:
            blocks_RC: float32 ``[R, C]``, finite, on any device.
            max_bytes: the codes' streams together may take this many bytes; None leaves the rate to the codec.
            side: what ``side_information`` gave for this round, or None.

        Raises:
            BudgetError: ``max_bytes`` is less than the codec can make.
        """
        ...

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        """Codes -> blocks on the codec's own device; the inverse, as nearly as the bytes allow."""
        ...


@runtime_checkable
class Reconstructs(Codec, Protocol):
    """A codec that knows what its codes decode to without reading them again."""

    def encode_with_decoded(
        self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None
    ) -> tuple[Codes, Tensor]:
        """What ``encode`` gives, and what ``decode`` makes of it, to the bit."""
        ...


class OneRate(Codec, Protocol):
    """A codec whose payloads of one layout are all of the same size."""

    @classmethod
    def stream_bytes(cls, layout: Layout, **options: Any) -> tuple[int, ...]:
        """Size of every stream of its codes, to the byte, with these options of its own (``CodecEntry.options``)."""
        ...


def codec_id(*parts: bytes | str | Mapping[str, object]) -> bytes:
    """4 bytes that stand for a codec: digest of its kind, settings (a mapping: whatever its order) and weights."""
    digest = hashlib.sha256()
    for part in parts:
        text = json.dumps(part, sort_keys=True) if isinstance(part, Mapping) else part
        digest.update(text.encode() if isinstance(text, str) else text)
        digest.update(b"\0")
    return digest.digest()[:4]


def floats_to_bytes(values: Tensor) -> bytes:
    """Values of any shape -> 4 little-endian bytes each."""
    return values.flatten().cpu().numpy().astype("<f4").tobytes()


def floats_of(data: bytes, count: int) -> Tensor:
    """Inverse of ``floats_to_bytes``, ``[count]``, NaN and infinity included. Raises CodecError: another number of
    bytes."""
    if len(data) != 4 * count:
        raise CodecError(f"{len(data)} bytes of float32 where {count} values are expected")
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))


def bfloats_to_bytes(values: Tensor) -> bytes:
    """Values of any shape, on the host -> 2 little-endian bytes each: bfloat16, and none of them infinite."""
    largest = torch.finfo(torch.bfloat16).max  # rounding must not reach infinity
    return values.clamp(-largest, largest).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()


def bfloats_of(data: bytes) -> Tensor:
    """Inverse of ``bfloats_to_bytes`` of an even number of bytes, float32 ``[len(data) / 2]``, NaN and infinity
    included."""
    return torch.from_numpy(np.frombuffer(data, "<i2").astype(np.int16)).view(torch.bfloat16).float()


class WithoutSideInformation:
    """For codecs that make nothing of the last global update."""

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class IdentityCodec(WithoutSideInformation):
    """Sends every value as float32: 32 bits per parameter, nothing lost. It has one rate and ignores the budget."""

    layout: Layout
    id: bytes = codec_id("identity/1")
    num_streams: int = 1

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (4 * layout.num_parameters,)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (floats_to_bytes(self.layout.flatten(blocks_RC)),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        return self.layout.unflatten(floats_of(codes[0], self.layout.num_parameters))
