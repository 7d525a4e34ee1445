"""The interface that every codec has, and the one that loses nothing.

Codecs see blocks (``layout.py``) and codes (``frame.py``), on the CPU at the border and any device inside. They know
neither files nor federations.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

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
        server, and sent to the clients, so that no float decides differently on two machines. None: nothing."""
        ...

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        """Blocks -> codes.

        Args:
            blocks_RC: float32 ``[R, C]``, finite.
            max_bytes: the codes' streams together may take this many bytes; None leaves the rate to the codec.
            side: what ``side_information`` gave for this round, or None.

        Raises:
            BudgetError: ``max_bytes`` is less than the codec can make.
        """
        ...

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        """Codes -> blocks; the inverse, as nearly as the bytes allow."""
        ...


def codec_id(*parts: bytes | str) -> bytes:
    """4 bytes that stand for a codec: digest of its kind, settings and weights."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.digest()[:4]


@dataclass(frozen=True)
class IdentityCodec:
    """Sends every value as float32: 32 bits per parameter, nothing lost. It has one rate and ignores the budget."""

    layout: Layout
    id: bytes = codec_id("identity/1")
    num_streams: int = 1

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        return None

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (self.layout.flatten(blocks_RC).cpu().numpy().astype("<f4").tobytes(),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) != 4 * self.layout.num_parameters:
            raise CodecError(f"{len(codes[0])} bytes of float32 for {self.layout.num_parameters} parameters")
        return self.layout.unflatten(torch.from_numpy(np.frombuffer(codes[0], "<f4").astype(np.float32)))
