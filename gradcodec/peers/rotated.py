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

from gradcodec.autoencoder.transform import Transform
from gradcodec.codec import codec_id
from gradcodec.errors import BudgetError, CodecError
from gradcodec.exchange import max_payload_bytes
from gradcodec.frame import Codes
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout
from gradcodec.peers.levels import MAX_LEVEL, Classes, Columns, Levels, Model, fit, pack_levels, unpack_levels
from gradcodec.peers.packing import OWN_BITS, Floats, finite

PRICE_OF_A_BIT = 0.115
"""In squared steps: ln(2) / 6, at which uniform thresholds trade at a high rate; lower rates mind it little."""
_DEAD_ZONE = 0.62
_HEADER = struct.Struct("<h4b")
_STEPS_PER_OCTAVE = 256
_SHIFTS = 128
_SPARSE, _MIDDLING = 46, 34
_PILOT_VALUES = 1 << 19
_CLOSE = 0.995


@dataclass(frozen=True)
class _Draft:
    """One step tried: signed levels, their model, and about how many bits they take."""

    step: int
    signed_RC: Levels
    classes_RC: Classes
    model: Model
    bits: float


class RotatedCodec:
    """``rotated``: any rate, down to a few bytes of header."""

    num_streams = 1
    id = codec_id("rotated/1")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._transform = Transform(layout, {})
        self._columns = Columns(layout)

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """Principal axes of the last global update, ``[B, R, R]`` float32."""
        return principal_axes(global_update_RC, self.layout)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        if max_bytes is None:
            max_bytes = max_payload_bytes(OWN_BITS, self.layout.num_parameters)
        coefficients_RC: Floats = self._transform.analyse(blocks_RC, side).cpu().numpy()
        silence = _write(_draft(np.zeros_like(coefficients_RC), self._columns, 0), coefficients_RC, self._columns)
        if len(silence) > max_bytes:
            raise BudgetError(f"{max_bytes} bytes for the codes; rotated needs at least {len(silence)}")
        if not coefficients_RC.any():
            return (silence,)
        return (self._fill(coefficients_RC, max_bytes, silence),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        if len(codes[0]) < _HEADER.size:
            raise CodecError(f"{len(codes[0])} bytes of codes: the header alone takes {_HEADER.size}")
        step, *shifts = _HEADER.unpack_from(codes[0])
        signed_RC, classes_RC = unpack_levels(codes[0][_HEADER.size :], self._columns)
        with np.errstate(over="ignore"):
            coefficients_RC = _restore(signed_RC, classes_RC, shifts) * np.float32(_width_of(step))
        blocks_RC = self._transform.synthesise(torch.from_numpy(finite(coefficients_RC)), side)
        finite(blocks_RC.numpy())
        return self.layout.unflatten(self.layout.flatten(blocks_RC))

    def _fill(self, coefficients_RC: Floats, max_bytes: int, silence: bytes) -> bytes:
        """The codes of the finest step that fits; a large update's is sought on a sample of its columns first."""
        peak = _step_of(float(np.abs(coefficients_RC).max()))
        search = _Search(peak - 16 * _STEPS_PER_OCTAVE, peak + _STEPS_PER_OCTAVE)
        share = coefficients_RC.size // _PILOT_VALUES
        if share > 1:
            blocks = self.layout.blocks[:: share + 1 - share % 2]  # A and B by turns
            columns = Columns(Layout.of({block.name: block.shape for block in blocks}))
            pilot_RC = np.concatenate([coefficients_RC[:, b.start : b.stop] for b in blocks], axis=1)
            target = max_bytes * pilot_RC.size / coefficients_RC.size
            while (step := search.next()) is not None:
                search.tell(step, _draft(pilot_RC, columns, step).bits / 8 / target)
            search = search.around()
        best = silence
        while (step := search.next()) is not None:
            draft = _draft(coefficients_RC, self._columns, step)
            filled = draft.bits / 8 / max_bytes
            if _CLOSE * len(best) / max_bytes < filled < 1 / _CLOSE:
                codes = _write(draft, coefficients_RC, self._columns)
                filled = len(codes) / max_bytes
                best = codes if len(best) < len(codes) <= max_bytes else best
            search.tell(step, filled)
        return best


class _Search:
    """The finest step whose codes fill at most all of the budget; smaller steps fill more, nearly always.

    ``low`` is a step that is too fine, ``high`` one that fits.
    """

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high
        self._at_low: float | None = None
        self._at_high: float | None = None
        self._done = False

    def next(self) -> int | None:
        """The step to try: between the two, where a line through the logarithms of what they fill meets 1."""
        gap = self._high - self._low
        if self._done or gap <= 1:
            return None
        if self._at_low is None or self._at_high is None or gap > _STEPS_PER_OCTAVE:
            return (self._low + self._high) // 2
        above, below = math.log(self._at_low), -math.log(self._at_high)
        place = self._low + round(gap * above / max(above + below, 1e-9))
        return min(max(place, self._low + 1), self._high - 1)

    def tell(self, step: int, filled: float) -> None:
        if filled > 1:
            self._low, self._at_low = step, filled
        else:
            self._high, self._at_high = step, max(filled, 1e-3)
        self._done = _CLOSE <= filled <= 1

    def around(self) -> _Search:
        """A search of a tenth of an octave about what was found."""
        return _Search(self._high - _STEPS_PER_OCTAVE // 8, self._high + _STEPS_PER_OCTAVE // 8)


def _draft(coefficients_RC: Floats, columns: Columns, step: int) -> _Draft:
    """Levels for a step: rounded with a dead zone, then again at the prices that those levels had."""
    scaled_RC = np.abs(coefficients_RC) / np.float32(_width_of(step))
    levels_RC = np.floor(np.minimum(scaled_RC + np.float32(1 - _DEAD_ZONE), MAX_LEVEL)).astype(np.int32)
    model, classes_RC, _ = fit(levels_RC, columns)
    levels_RC = _round_at_prices(scaled_RC, model, classes_RC)
    model, classes_RC, bits = fit(levels_RC, columns, model)
    signed_RC = np.where(coefficients_RC < 0, -levels_RC, levels_RC)
    return _Draft(step, signed_RC, classes_RC, model, bits + 8 * _HEADER.size)


def _round_at_prices(scaled_RC: Floats, model: Model, classes_RC: Classes) -> Levels:
    """For every value the level of least squared error plus price, of the nearest, the next lower and 0."""
    places = np.flatnonzero(scaled_RC > 0.5)
    values, classes = scaled_RC.reshape(-1)[places], classes_RC.reshape(-1)[places].astype(np.int64)
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
    levels_RC.reshape(-1)[places] = best
    return levels_RC


def _write(draft: _Draft, coefficients_RC: Floats, columns: Columns) -> bytes:
    scaled_RC = np.abs(coefficients_RC) / np.float32(_width_of(draft.step))
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


def _step_of(width: float) -> int:
    return round(_STEPS_PER_OCTAVE * math.log2(max(width, 2.0**-100)))


def _width_of(step: int) -> float:
    """Width of a step of the quantiser, in the update's units."""
    return float(2.0 ** (step / _STEPS_PER_OCTAVE))
