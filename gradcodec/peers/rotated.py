"""``rotated``: our hand-made floor, what a scalar quantiser reaches with all that both ends know, and nothing learned.

    blocks -> rows in the principal axes of the last global update (gauge.py), as the learned codec has them
           -> one step for all rows (reverse water-filling), rounded by rate and distortion together
           -> levels entropy-coded, classes by row and column (levels.py)

Uniform thresholds with entropy coding stay within 0.1 bit of the rate-distortion function of a Gaussian and come near
the best scalar quantiser at all rates (Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian
random variables"); a budget moves the step and nothing else.

    offset  size  field
    0       2     step: base-2 logarithm in 1/256 (int16)
    2       4     what is added to a magnitude, in 1/128 of a step (int8): to level 1 of dense, middling and sparse
                  classes, and to higher levels
    6       -     levels (levels.py)

Shape suffixes: R rank, C columns.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.codec import codec_id
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout
from gradcodec.peers.levels import MAX_LEVEL, Classes, Columns, Levels, Model, fit, pack_levels, unpack_levels
from gradcodec.peers.packing import Floats, budget_of, finite
from gradcodec.transform import Transform

PRICE_OF_A_BIT = 0.115
"""In squared steps: ln(2) / 6, at which uniform thresholds trade at a high rate; lower rates mind it little."""
_DEAD_ZONE = 0.62
_HEADER = struct.Struct("<h4b")
_STEPS_PER_OCTAVE = 256
_COARSEST_STEP = (1 << 15) - 1
_SHIFTS = 128
_SPARSE, _MIDDLING = 46, 34
_PILOT_VALUES = 1 << 19
_PILOT_WIDTH = 64
_NEAR = 16
_NEWTON_STEPS = 5
_CLOSE = 0.99


@dataclass(frozen=True)
class _Draft:
    """One step tried: signed levels, their model, and about how many bits the model and the levels take."""

    step: int
    signed_RC: Levels
    classes_RC: Classes
    model: Model
    head_bits: float
    bits: float

    def num_bytes(self, times: float = 1.0) -> float:
        """About what the codes take if there are ``times`` as many values of the same kinds in as many rows."""
        return _HEADER.size + 1 + (self.head_bits + times * self.bits) / 8


class RotatedCodec:
    """``rotated``: any rate, down to a few bytes of header."""

    num_streams = 1
    id = codec_id("rotated/1")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._transform = Transform(layout, {})
        self._columns = Columns(layout, layout.rank)

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """Principal axes of the last global update, ``[B, R, R]`` float32."""
        return principal_axes(global_update_RC, self.layout)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        max_bytes = budget_of(max_bytes, self.layout.num_parameters)
        coefficients_RC: Floats = self._transform.analyse(blocks_RC, side).cpu().numpy()
        return (self._fill(coefficients_RC, max_bytes),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) < _HEADER.size:
            raise CodecError(f"{len(codes[0])} bytes of codes: the header alone takes {_HEADER.size}")
        step, *shifts = _HEADER.unpack_from(codes[0])
        signed_RC, classes_RC = unpack_levels(codes[0][_HEADER.size :], self._columns)
        with np.errstate(over="ignore", invalid="ignore"):
            coefficients_RC = _restore(signed_RC, classes_RC, shifts) * np.float32(_width_of(step))
        blocks_RC = self._transform.synthesise(torch.from_numpy(finite(coefficients_RC)), side)
        finite(blocks_RC.numpy())
        return self.layout.unflatten(self.layout.flatten(blocks_RC))

    def _fill(self, coefficients_RC: Floats, max_bytes: int) -> bytes:
        """The codes of the finest step that fits; a large update's is sought on a sample of its columns first."""
        best = b""
        search = self._search(coefficients_RC, max_bytes)
        while (step := search.next()) is not None:
            draft = _draft(coefficients_RC, self._columns, step)
            filled = draft.num_bytes() / max_bytes
            if _CLOSE * len(best) / max_bytes < filled < 1 / _CLOSE:
                codes = _write(draft, coefficients_RC, self._columns)
                filled = len(codes) / max_bytes
                best = codes if len(best) < len(codes) <= max_bytes else best
            search.record(step, filled)
        if best:
            return best
        zeros_RC = np.zeros_like(coefficients_RC)
        silence = _write(_draft(zeros_RC, self._columns, 0), zeros_RC, self._columns)
        if len(silence) > max_bytes:
            raise BudgetError(f"{max_bytes} bytes for the codes; rotated needs at least {len(silence)}")
        return silence

    def _search(self, coefficients_RC: Floats, max_bytes: int) -> _Search:
        peak = float(np.abs(coefficients_RC).max())
        if peak == 0:
            return _Search(0, 0)
        finest, coarsest = (
            _step_of(peak) - 16 * _STEPS_PER_OCTAVE,
            min(_step_of(peak) + _STEPS_PER_OCTAVE, _COARSEST_STEP),
        )
        share = min(coefficients_RC.size // _PILOT_VALUES, min(b.width for b in self.layout.blocks) // _PILOT_WIDTH)
        if share <= 1:
            return _Search(finest, coarsest)
        kept = np.concatenate([np.arange(b.start, b.stop, share) for b in self.layout.blocks])
        shapes = [(1, -(-b.width // share)) for b in self.layout.blocks]
        named = zip(self.layout.blocks, shapes, strict=True)
        columns = Columns(
            Layout.of({b.name: shape[::-1] if b.transposed else shape for b, shape in named}), len(coefficients_RC)
        )
        pilot_RC = np.ascontiguousarray(coefficients_RC[:, kept])

        def filled(step: int) -> float:
            return _draft(pilot_RC, columns, step).num_bytes(coefficients_RC.size / pilot_RC.size) / max_bytes

        search = _Search(finest, coarsest)
        while (step := search.next()) is not None:
            search.record(step, filled(step))
        found = search.high
        slope = math.log(max(filled(found - _NEAR), 1e-9) / max(filled(found + _NEAR), 1e-9)) / (2 * _NEAR)
        return _Search(finest, coarsest, found, max(slope, 1e-4))


class _Search:
    """The finest step whose codes fill at most all of the budget; finer steps fill more, nearly always.

    ``low`` is too fine, ``high`` fits. With a ``first`` guess and the ``slope`` of the logarithm of what steps fill,
    Newton's steps from there; else bisection, and straight lines once two ends are known.
    """

    def __init__(self, low: int, high: int, first: int | None = None, slope: float | None = None) -> None:
        self.low, self.high = low, high
        self._guess = first
        self._slope = slope
        self._fills: dict[int, float] = {}
        self._done = False

    def next(self) -> int | None:
        """The step to try; None: found."""
        gap = self.high - self.low
        if self._done or gap <= 1:
            return None
        if self._guess is not None:
            candidate = self._guess
        elif gap > _STEPS_PER_OCTAVE or not {self.low, self.high} <= self._fills.keys():
            candidate = (self.low + self.high) // 2
        else:
            above, below = math.log(self._fills[self.low]), -math.log(self._fills[self.high])
            candidate = self.low + round(gap * above / max(above + below, 1e-9))
        return min(max(candidate, self.low + 1), self.high - 1)

    def record(self, step: int, filled: float) -> None:
        """What a step fills, as a share of the budget."""
        self._fills[step] = max(filled, 1e-6)
        if filled > 1:
            self.low = step
        else:
            self.high = step
        self._done = _CLOSE <= filled <= 1
        if self._slope is not None:
            target = math.log(self._fills[step]) - math.log(1 + _CLOSE) + math.log(2)
            self._guess = step + math.ceil(target / self._slope) if len(self._fills) < _NEWTON_STEPS else None


def _draft(coefficients_RC: Floats, columns: Columns, step: int) -> _Draft:
    """Levels for a step: rounded with a dead zone, then again at the prices that those levels had."""
    scaled_RC = _in_steps(coefficients_RC, step)
    levels_RC = np.floor(np.minimum(scaled_RC + np.float32(1 - _DEAD_ZONE), MAX_LEVEL)).astype(np.int32)
    model, classes_RC, *_ = fit(levels_RC, columns)
    levels_RC = _round_at_prices(scaled_RC, model, classes_RC)
    model, classes_RC, head_bits, bits = fit(levels_RC, columns, model)
    signed_RC = np.where(coefficients_RC < 0, -levels_RC, levels_RC)
    return _Draft(step, signed_RC, classes_RC, model, head_bits, bits)


def _round_at_prices(scaled_RC: Floats, model: Model, classes_RC: Classes) -> Levels:
    """For every value the level of least squared error plus price, of the nearest, the next lower and 0."""
    positions = np.flatnonzero(scaled_RC > 0.5)
    values, classes = scaled_RC.reshape(-1)[positions], classes_RC.reshape(-1)[positions].astype(np.int64)
    prices = (np.minimum(model.bits_TM, 64) * np.float32(PRICE_OF_A_BIT)).reshape(-1)
    width = model.bits_TM.shape[1]
    nearest = np.floor(np.minimum(values + np.float32(0.5), MAX_LEVEL)).astype(np.int64)
    best = np.zeros_like(nearest)
    least = np.square(values) + prices[classes * width]
    for level in (nearest - 1, nearest):
        cost = np.square(values - level) + prices[classes * width + np.minimum(level, width - 1)]
        better = cost < least
        best[better], least[better] = level[better], cost[better]
    levels_RC = np.zeros(scaled_RC.shape, np.int32)
    levels_RC.reshape(-1)[positions] = best
    return levels_RC


def _write(draft: _Draft, coefficients_RC: Floats, columns: Columns) -> bytes:
    scaled_RC = _in_steps(coefficients_RC, draft.step)
    levels_RC = np.abs(draft.signed_RC)
    shifts = [0] * 4
    for kind, chosen in enumerate(_kinds(levels_RC, draft.classes_RC)):
        if chosen.any():
            mean = float((scaled_RC[chosen] - levels_RC[chosen]).mean(dtype=np.float64))
            shifts[kind] = min(max(round(_SHIFTS * mean), -_SHIFTS + 1), _SHIFTS - 1)
    body = pack_levels(draft.signed_RC, draft.model, draft.classes_RC, columns)
    return _HEADER.pack(draft.step, *shifts) + body


def _restore(signed_RC: Levels, classes_RC: Classes, shifts: list[int]) -> Floats:
    """Levels -> values in steps, each at the centroid of its kind."""
    levels_RC = np.abs(signed_RC)
    values_RC = levels_RC.astype(np.float32)
    for shift, chosen in zip(shifts, _kinds(levels_RC, classes_RC), strict=True):
        values_RC[chosen] += np.float32(shift / _SHIFTS)
    return np.where(signed_RC < 0, -values_RC, values_RC)


def _kinds(levels_RC: Levels, classes_RC: Classes) -> list[NDArray[np.bool_]]:
    """Which values share a centroid: level 1 of dense, middling and sparse classes, and all higher levels."""
    ones = levels_RC == 1
    sparse, dense = classes_RC >= _SPARSE, classes_RC < _MIDDLING
    return [ones & dense, ones & ~dense & ~sparse, ones & sparse, levels_RC > 1]


def _in_steps(coefficients_RC: Floats, step: int) -> Floats:
    """Magnitudes over the width of a step."""
    scaled_RC: Floats = np.abs(coefficients_RC)
    scaled_RC /= np.float32(_width_of(step))
    return scaled_RC


def _step_of(width: float) -> int:
    return round(_STEPS_PER_OCTAVE * math.log2(max(width, 2.0**-100)))


def _width_of(step: int) -> float:
    """Width of a step of the quantiser, in the update's units."""
    return float(2.0 ** (step / _STEPS_PER_OCTAVE))
