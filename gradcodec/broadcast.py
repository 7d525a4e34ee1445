"""The way down: how the server's step becomes a payload, and the payload the same state on every client, to the bit.

Both ends hold how far the global adapter has moved since its start, and the codec's side information. A round's step
travels as a payload of ``exchange``; what of it a payload leaves out stays with the server and goes into the next one.

A decoder computes in floating point, and another library or device rounds in another way. So a decoded step is put on a
grid, of which both ends know every point exactly; the few values that lie so near the middle between two points that
machines might disagree are named in the broadcast.

A *key* is a step from the start itself, all of the movement so far in one payload. What it leaves out, too, stays with
the server for the steps behind it, and whoever holds the start needs nothing that went before.

    step of a broadcast
    offset  size  field
    0       2     grid: base-2 logarithm (int16, little-endian)
    2       -     count of the values that are named, then for each: twice its distance from the one before, plus 1 if
                  it is rounded up; all of them varints (LEB128)
    -       -     payload (``frame.py``), whose context is the digest of the state that it is a step from; a key's that
                  of the start without side information

    bundle: what a client needs to hold what the server holds
    offset  size  field
    0       -     bytes of the snapshot, 0 if there is none; number of steps; bytes of each: varints
    -       -     snapshot: safetensors; then the steps, oldest first

Shape suffixes: R rank, C columns, N parameters.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import Residual, decode_blocks, digest_of, encode_update
from gradcodec.fidelity import inner_product
from gradcodec.frame import pack_length, unpack_length
from gradcodec.layout import Layout

_GRID = struct.Struct("<h")
_POINTS_PER_DEVIATION = 16
"""Rounding to the grid adds 1 / (12 * 16^2) of a step's energy to its error, and the next step makes up for it."""
_TOLERANCE = 2.0**-20
"""Share of a block's largest value by which machines that decode the same payload may differ, nearly always; where they
differ by more, and it matters, digests differ and a snapshot is sent."""
_PARAMETERS_PER_BYTE = 2500
"""About one value in 6,000 is named, in two bytes."""
_MANY = 256
_COARSE = 127
_ROUND_UP_FROM = math.sqrt(2) - 1
"""A little off the middle: decoders that send halves, quarters and eighths give values that lie right there."""
_EXACT_BITS = 22
"""Multiples of the grid that the sum of all steps may hold, well within float32's 24."""
_FINEST, _COARSEST = -126, 100
_MOST_STEPS = 1 << 16
_SAVED_BITS = 0.5
"""What ``learned`` saves on a key beside Gaussians of one strength, about, on adapters that had moved for 12 rounds."""
_MOST_BITS = 16.0
"""A finer key would be as long as a snapshot, which is exact."""
_TINY = 1e-300
_SKETCH_STEP = 2.0**-6


@dataclass(frozen=True)
class Held:
    """What server and clients hold alike.

    ``start_RC`` and ``moved_RC``, blocks ``[R, C]`` float32 on the CPU: the adapter is their sum. ``side``: the codec's
    side information of the next round (``Codec.side_information``); equal to rounding, the rest to the bit.
    """

    start_RC: Tensor
    moved_RC: Tensor
    side: Tensor | None = None

    @classmethod
    def at_start(cls, start_RC: Tensor, side: Tensor | None = None) -> Held:
        """Before any step."""
        start_RC = start_RC.cpu()
        return cls(start_RC, torch.zeros_like(start_RC), side)

    @property
    def adapter_RC(self) -> Tensor:
        return self.start_RC + self.moved_RC

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits by which both ends call what they hold; a sketch stands for the side information."""
        whole = hashlib.sha256(start_digest(self.start_RC).encode())
        whole.update(self.moved_RC.contiguous().numpy().data)
        whole.update(_sketch(self.side))
        return whole.hexdigest()[:16]

    @property
    def claim(self) -> str:
        """How a client says what it holds: the digest, and that of its start adapter."""
        return f"{self.digest}/{start_digest(self.start_RC)}"


def start_digest(start_RC: Tensor) -> str:
    """16 hexadecimal digits of the blocks that a run starts from."""
    return hashlib.sha256(start_RC.contiguous().cpu().numpy().data).hexdigest()[:16]


# One step


def encode_step(
    step_RC: Tensor,
    carried_RC: Tensor | None,
    *,
    held: Held,
    codec: Codec,
    max_bytes: int | None,
    context: bytes = b"",
) -> tuple[bytes, Held, Residual]:
    """The server's step -> a step of a broadcast, what all hold after it, and what it left out.

    Args:
        step_RC: blocks ``[R, C]`` float32: by how much the adapter is to change.
        carried_RC: what earlier steps left out, or None.
        held: before the step.
        codec: of the round, built for ``held``.
        max_bytes: upper bound of the result; None, or a codec of one rate: what it takes.
        context: names the run.

    Raises:
        CodecError: the step is not finite, or beyond what the codec serves.
        BudgetError: no payload of ``max_bytes`` can be made.
    """
    own_context = _context(context, held)
    room = None if max_bytes is None else max_bytes - _GRID.size - codec.layout.num_parameters // _PARAMETERS_PER_BYTE
    while True:
        payload, residual = encode_update(
            codec.layout.to_update(step_RC),
            carried_RC,
            codec=codec,
            max_bytes=room,
            side=held.side,
            context=own_context,
        )
        decoded_RC = _own(decode_blocks(payload, codec=codec, side=held.side, context=own_context), codec.layout)
        head, settled_RC = _settled(decoded_RC, held.moved_RC, codec.layout)
        over = 0 if max_bytes is None else len(head) + len(payload) - max_bytes
        if room is None or over <= 0 or len(payload) > room:  # a codec of one rate takes what it takes
            break
        room -= over
    data = head + payload
    target_RC = residual.target_RC.cpu()
    return data, _after(held, settled_RC, codec), Residual(target_RC, target_RC - settled_RC, digest_of(data))


def decode_step(data: bytes, *, held: Held, codec: Codec, context: bytes = b"") -> Held:
    """Inverse of ``encode_step``: what is held after the step. It decodes, or raises ``CodecError``, never anything
    else; nothing is taken on trust.

    Args:
        held: what the step starts from.
        codec: equal to the sender's, built for ``held``.
        context: the sender's.
    """
    if len(data) < _GRID.size:
        raise CodecError(f"a step of {len(data)} bytes: its head alone takes {_GRID.size}")
    (exponent,) = _GRID.unpack_from(data)
    count, offset = unpack_length(data, _GRID.size)
    if count > codec.layout.num_parameters or not _FINEST <= exponent <= _COARSEST:
        raise CodecError(f"a step with {count} named values on a grid of 2 ** {exponent} is none")
    gaps = []
    for _ in range(count):
        gap, offset = unpack_length(data, offset)
        gaps.append(gap)
    context = _context(context, held)
    decoded_RC = _own(decode_blocks(data[offset:], codec=codec, side=held.side, context=context), codec.layout)
    gaps_N = torch.tensor(gaps, dtype=torch.int64)
    positions_N = (gaps_N >> 1).cumsum(0)
    if count and int(positions_N[-1]) >= decoded_RC.numel():
        raise CodecError("a step names a value beyond the last one")
    points = decoded_RC.double() * 2.0**-exponent
    settled = (points + _ROUND_UP_FROM).floor_().flatten()
    settled[positions_N] = points.flatten()[positions_N].floor() + (gaps_N & 1)
    settled_RC = (settled.view_as(points) * 2.0**exponent).float()
    if not bool((held.adapter_RC + settled_RC).isfinite().all()):
        raise CodecError("the step decodes to values beyond float32")
    return _after(held, settled_RC, codec)


def _settled(decoded_RC: Tensor, moved_RC: Tensor, layout: Layout) -> tuple[bytes, Tensor]:
    """The head of a step, and the decoded values on its grid."""
    norm = float(torch.linalg.vector_norm(decoded_RC, dtype=torch.float64))
    if norm == 0:
        return _GRID.pack(0) + pack_length(0), torch.zeros_like(decoded_RC)
    deviation = norm / math.sqrt(layout.num_parameters)
    largest = float(decoded_RC.abs().max() + moved_RC.abs().max())
    fine, exact = math.log2(deviation / _POINTS_PER_DEVIATION), math.log2(largest) - _EXACT_BITS
    exponent = max(math.floor(fine), math.ceil(exact), _FINEST)
    while True:
        points = decoded_RC.double() * 2.0**-exponent
        settled = (points + _ROUND_UP_FROM).floor_()
        positions_N = _near_the_middle(points, layout)
        if len(positions_N) <= layout.num_parameters // _MANY or exponent == _FINEST:
            break
        exponent -= 1  # a codec of few values, and one of them lies there
    ups_N = (settled > points).flatten()[positions_N]
    gaps_N = torch.diff(positions_N, prepend=positions_N.new_zeros(1))
    named = b"".join(pack_length(2 * gap + up) for gap, up in zip(gaps_N.tolist(), ups_N.tolist(), strict=True))
    return _GRID.pack(exponent) + pack_length(len(positions_N)) + named, (settled * 2.0**exponent).float()


def _near_the_middle(points: Tensor, layout: Layout) -> Tensor:
    """Places, in the flattened blocks, of values that another machine might round to the other side."""
    distance = (points - points.floor() - (1 - _ROUND_UP_FROM)).abs_()
    for block in layout.blocks:
        columns = slice(block.start, block.stop)
        distance[:, columns] -= _TOLERANCE * points[:, columns].abs().max()
    return (distance < 0).flatten().nonzero().flatten()


def _own(blocks_RC: Tensor, layout: Layout) -> Tensor:
    """On the CPU, and zero where a block has fewer rows than others: there are no parameters."""
    return layout.unflatten(layout.flatten(blocks_RC.cpu()))


def _after(held: Held, settled_RC: Tensor, codec: Codec) -> Held:
    return Held(held.start_RC, held.moved_RC + settled_RC, codec.side_information(settled_RC))


def _context(context: bytes, held: Held) -> bytes:
    return context + b"/step/" + held.digest.encode()


def key_bytes(moved_RC: Tensor, step_RC: Tensor, layout: Layout, least: int) -> int:
    """What a key takes that leaves out about one step's energy, by the rate-distortion function of Gaussians.

    Args:
        moved_RC: all of the movement since the start, as blocks ``[R, C]``.
        step_RC: a round's step, likewise.
        layout: theirs.
        least: bytes of a step, which a key takes at least.
    """
    whole, step = inner_product(moved_RC, moved_RC), inner_product(step_RC, step_RC)
    if not math.isfinite(whole + step):
        return layout.num_parameters * 4
    bits = 0.5 * (math.log2(max(whole, _TINY)) - math.log2(max(step, _TINY))) - _SAVED_BITS
    return max(least, math.ceil(min(max(bits, 0.0), _MOST_BITS) * layout.num_parameters / 8))


# All of it at once


def pack_snapshot(held: Held, layout: Layout, with_start: bool) -> bytes:
    """What is held, for who holds nothing; ``with_start``: nor can make the start adapter."""
    moved_N = layout.flatten(held.moved_RC)
    exponent = _grid_of(moved_N)
    tensors = {"moved": moved_N} if exponent is None else _packed_points(moved_N, exponent)
    if held.side is not None:
        side = held.side.contiguous().cpu()
        is_coarse = torch.equal(coarse_side(side), side)
        tensors["side"] = side.mul(_COARSE).round().to(torch.int8) if is_coarse else side
    if with_start:
        tensors["start"] = _deflated(layout.flatten(held.start_RC).numpy())
    return bytes(save(tensors))


def coarse_side(side: Tensor) -> Tensor:
    """Side information whose values are at most 1, as good in a byte a value: the server's to choose before the first
    step, afterwards both ends find it out to float32."""
    return side.cpu().mul(_COARSE).round().clamp(-_COARSE, _COARSE) / _COARSE


def unpack_snapshot(data: bytes, layout: Layout, start_RC: Tensor) -> Held:
    """Inverse of ``pack_snapshot``. Raises CodecError: it is none of this layout.

    Args:
        start_RC: the start adapter that this side makes; used if the snapshot has none.
    """
    num = layout.num_parameters
    try:
        tensors = load(data)
        moved_N = tensors["moved"]
        if "grid" in tensors:
            moved_N = _unpacked_points(moved_N, tensors["grid"], num)
        start, side = tensors.get("start"), tensors.get("side")
        start_N = start
        if start is not None and start.dtype == torch.uint8:  # what was written as float32 is still read
            start_N = torch.from_numpy(_inflated(start, num).view("<f4"))
        if side is not None and side.dtype == torch.int8:
            side = side.float() / _COARSE
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RuntimeError, zlib.error) as error:
        raise CodecError(f"a snapshot cannot be read: {error!r}") from None
    for values_N in (moved_N, moved_N if start_N is None else start_N):
        if values_N.shape != (num,) or values_N.dtype != torch.float32:
            raise CodecError(f"a snapshot with {values_N.dtype} {tuple(values_N.shape)}: {num} float32 are expected")
    if side is not None and (side.dtype != torch.float32 or not bool(side.isfinite().all())):
        raise CodecError("a snapshot with side information that is no finite float32")
    moved_RC = layout.unflatten(moved_N)
    held = Held(start_RC.cpu() if start_N is None else layout.unflatten(start_N), moved_RC, side)
    if not bool(held.adapter_RC.isfinite().all()):
        raise CodecError("a snapshot holds NaN or infinity")
    return held


def _packed_points(moved_N: Tensor, exponent: int) -> dict[str, Tensor]:
    points_N = (moved_N.double() * 2.0**-exponent).to(torch.int64).numpy()
    zigzag_N = ((points_N << 1) ^ (points_N >> 63)).astype("<u4")
    return {"moved": _deflated(zigzag_N), "grid": torch.tensor([exponent], dtype=torch.int16)}


def _unpacked_points(packed: Tensor, grid: Tensor, num: int) -> Tensor:
    """Inverse of ``_packed_points``. Raises ValueError or zlib.error: that it is not."""
    (exponent,) = grid.tolist()
    if not _FINEST - 23 <= int(exponent) <= _COARSEST:
        raise ValueError(f"values on a grid of 2 ** {exponent}")
    zigzag_N = _inflated(packed, num).view("<u4").astype(np.int64)
    points_N = torch.from_numpy((zigzag_N >> 1) ^ -(zigzag_N & 1))
    return (points_N.double() * 2.0 ** int(exponent)).float()


def _deflated(values_N: NDArray[Any]) -> Tensor:
    """Values of 4 bytes each, by planes of bytes: the highest are nearly all alike."""
    planes = np.ascontiguousarray(values_N.view(np.uint8).reshape(-1, 4).T)
    return torch.from_numpy(np.frombuffer(zlib.compress(planes.tobytes(), 9), np.uint8).copy())


def _inflated(packed: Tensor, num: int) -> NDArray[np.uint8]:
    """Inverse of ``_deflated``: the bytes of ``num`` values. Raises ValueError or zlib.error: that they are not."""
    unpacker = zlib.decompressobj()
    planes = unpacker.decompress(packed.numpy().tobytes(), 4 * num + 1)
    if len(planes) != 4 * num or not unpacker.eof:
        raise ValueError(f"{len(planes) // 4} values: {num} are expected")
    return np.frombuffer(planes, np.uint8).reshape(4, num).T.copy().ravel()


def _grid_of(values_N: Tensor) -> int | None:
    """The coarsest grid that holds all values, 2 to this; None: none does within 30 bits."""
    largest = float(values_N.abs().max())
    exponent = math.floor(math.log2(largest)) if largest > 0 else 0
    for finer in range(29):
        if not bool((values_N.double() * 2.0 ** (finer - exponent)).frac().any()):
            return exponent - finer
    return None


@dataclass(frozen=True)
class Bundle:
    """What a client is sent: where it begins, and the steps from there."""

    snapshot: bytes
    steps: tuple[bytes, ...]


def pack_bundle(snapshot: bytes, steps: Sequence[bytes]) -> bytes:
    """Snapshot, or empty, and steps, oldest first, in one."""
    lengths = [len(snapshot), len(steps), *map(len, steps)]
    return b"".join([*map(pack_length, lengths), snapshot, *steps])


def unpack_bundle(data: bytes) -> Bundle:
    """Inverse of ``pack_bundle``. Raises CodecError: it is none."""
    size, offset = unpack_length(data, 0)
    count, offset = unpack_length(data, offset)
    if count > _MOST_STEPS:
        raise CodecError(f"a bundle of {count} steps: {_MOST_STEPS} are the most")
    sizes = [size]
    for _ in range(count):
        one, offset = unpack_length(data, offset)
        sizes.append(one)
    if sum(sizes) != len(data) - offset:
        raise CodecError(f"a bundle announces {sum(sizes)} bytes, {len(data) - offset} are left")
    parts = []
    for one in sizes:
        parts.append(data[offset : offset + one])
        offset += one
    return Bundle(parts[0], tuple(parts[1:]))


def catch_up(
    held: Held, bundle: Bundle, *, layout: Layout, codec_at: Callable[[Held], Codec], context: bytes = b""
) -> Held:
    """What a client holds once it has taken in what it was sent. Raises CodecError: the bundle does not fit.

    Args:
        held: before; of it a snapshot leaves the start adapter alone.
        codec_at: the codec of the round that starts from such a state.
        context: the sender's.
    """
    if bundle.snapshot:
        held = unpack_snapshot(bundle.snapshot, layout, held.start_RC)
    for step in bundle.steps:
        held = decode_step(step, held=held, codec=codec_at(held), context=context)
    return held


def _sketch(side: Tensor | None) -> bytes:
    """A few bytes that stand for side information: equal if it differs by rounding alone."""
    if side is None:
        return b""
    generator = torch.Generator().manual_seed(1)
    probe = torch.rand(side.numel(), dtype=torch.float64, generator=generator)
    return str(round(float(probe @ side.flatten().double().cpu()) / _SKETCH_STEP)).encode()
