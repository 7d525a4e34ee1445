"""Fixed-rate codecs that treat values alone or in short runs: ``bf16``, ``int8``, ``nf4`` and ``sign``.

The first three are what deployed federated systems offer (NVFlare's message quantisation: 16, 8 and 4.5 bits);
``sign`` is one bit and a scale per tensor (EF-signSGD: Karimireddy et al. 2019, "Error Feedback Fixes SignSGD").
They have one rate each and ignore the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec.codec import WithoutSideInformation, bfloats_of, bfloats_to_bytes, codec_id, floats_of
from gradcodec.errors import CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.peers.packing import Floats, finite, nearest, pack_indices, packed_bytes, unpack_indices

INT8_RUN = 4096
NF4_RUN = 64
NF4_TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""NormalFloat4: quantiles of a normal with an exact zero (Dettmers et al. 2023, "QLoRA", appendix E). A copy, since
this library must not import bitsandbytes."""


@dataclass(frozen=True)
class _FixedRate(WithoutSideInformation):
    layout: Layout
    num_streams: int = 1

    def _values(self, blocks_RC: Tensor) -> Floats:
        values: Floats = self.layout.flatten(blocks_RC).cpu().numpy()
        return values

    def _blocks(self, values: Floats) -> Tensor:
        return self.layout.unflatten(torch.from_numpy(finite(values)))


@dataclass(frozen=True)
class Bf16Codec(_FixedRate):
    """``bf16``: the upper half of every float32, rounded to nearest: 16 bits."""

    id: bytes = codec_id("bf16/1")

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (2 * layout.num_parameters,)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (bfloats_to_bytes(self.layout.flatten(blocks_RC).cpu()),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) != 2 * self.layout.num_parameters:
            raise CodecError(f"{len(codes[0])} bytes of bfloat16 for {self.layout.num_parameters} parameters")
        return self._blocks(bfloats_of(codes[0]).numpy())


@dataclass(frozen=True)
class Int8Codec(_FixedRate):
    """``int8``: runs of 4,096 values over their largest magnitude (float32), rounded to -127..127: 8.01 bits."""

    id: bytes = codec_id("int8/1")

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (4 * -(-layout.num_parameters // INT8_RUN) + layout.num_parameters,)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        runs, scales = _runs(self._values(blocks_RC), INT8_RUN)
        levels = np.rint(runs / _safe(scales) * 127).astype(np.int8).reshape(-1)[: self.layout.num_parameters]
        return (scales.astype("<f4").tobytes() + levels.tobytes(),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        count = self.layout.num_parameters
        scales, body = _split_scales(codes[0], -(-count // INT8_RUN))
        if len(body) != count:
            raise CodecError(f"{len(body)} bytes of int8 for {count} parameters")
        levels = np.frombuffer(body, np.int8).astype(np.float32) / np.float32(127)
        with np.errstate(over="ignore"):  # refused where the blocks are checked
            return self._blocks(levels * scales.repeat(INT8_RUN)[:count])


@dataclass(frozen=True)
class Nf4Codec(_FixedRate):
    """``nf4``: runs of 64 values over their largest magnitude (float32), each to the nearest of 16: 4.5 bits.

    As deployed by bitsandbytes and NVFlare, without QLoRA's second quantisation of the scales.
    """

    id: bytes = codec_id("nf4/1")

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (4 * -(-layout.num_parameters // NF4_RUN) + packed_bytes(layout.num_parameters, 4),)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        runs, scales = _runs(self._values(blocks_RC), NF4_RUN)
        indices = nearest(runs / _safe(scales), NF4_TABLE).reshape(-1)[: self.layout.num_parameters]
        return (scales.astype("<f4").tobytes() + pack_indices(indices, 4),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        count = self.layout.num_parameters
        scales, body = _split_scales(codes[0], -(-count // NF4_RUN))
        return self._blocks(NF4_TABLE[unpack_indices(body, 4, count)] * scales.repeat(NF4_RUN)[:count])


@dataclass(frozen=True)
class SignCodec(_FixedRate):
    """``sign``: a bit a value and the mean magnitude of every tensor (float32), its scale of least squared error."""

    id: bytes = codec_id("sign/1")

    @classmethod
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        return (4 * len(layout.blocks) + packed_bytes(layout.num_parameters, 1),)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        values = self._values(blocks_RC)
        starts = np.cumsum([0] + [block.size for block in self.layout.blocks[:-1]])
        scales = np.add.reduceat(np.abs(values).astype(np.float64), starts) / self._sizes()
        return (scales.astype("<f4").tobytes() + pack_indices((values < 0).astype(np.uint8), 1),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        count = self.layout.num_parameters
        scales, body = _split_scales(codes[0], len(self.layout.blocks))
        signs = 1 - 2 * unpack_indices(body, 1, count).astype(np.float32)
        return self._blocks(signs * scales.repeat(self._sizes()))

    def _sizes(self) -> list[int]:
        return [block.size for block in self.layout.blocks]


def _runs(values: Floats, run: int) -> tuple[Floats, Floats]:
    """Values, zero-padded, as ``[N, run]``, and per run its largest magnitude, ``[N]``."""
    runs = np.pad(values, (0, -len(values) % run)).reshape(-1, run)
    return runs, np.abs(runs).max(axis=1)


def _safe(scales: Floats) -> Floats:
    """What runs are divided by, ``[N, 1]``: a run of zeros by 1."""
    return np.where(scales > 0, scales, np.float32(1))[:, None]


def _split_scales(data: bytes, count: int) -> tuple[Floats, bytes]:
    return finite(floats_of(data[: 4 * count], count).numpy()), data[4 * count :]
