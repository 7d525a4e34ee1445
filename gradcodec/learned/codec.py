"""The learned codec: rotation, an expected spectrum, one step for all, everything entropy-coded.

    blocks -> rotate along rank and width (transform.py)
           -> how strong every coefficient is expected to be (spectrum.py)
           -> one step: a coefficient's class is the energy expected of it over the step (quantizer.py)
           -> symbols class by class -> range coder (entropy.py)

One artifact serves every budget and every geometry: only the step changes. The codes are one stream:

    offset  size  field
    0       2     step: base-2 logarithm in 1/64 (int16)
    2       2     shift: what is added to a level to give a class (int16)
    4       -     corrections of the spectrum, then row by row the symbols from the lowest class to the highest,
                  range-coded; nothing at all if the shift says that every coefficient is silent

Departures from the paper: its ResNet over a picture of all factors carries no client information
(``docs/negative-results.md``). Shape suffixes: R rank, C columns, N coefficients.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.codec import codec_id
from gradcodec.entropy import SymbolReader, Symbols, Table, bits_of, encode_symbols
from gradcodec.errors import BudgetError, CodecError, DivergedError
from gradcodec.frame import Codes
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout
from gradcodec.learned.basis import Prior, derive, sketch
from gradcodec.learned.quantizer import MAX_CLASS, MIN_CLASS, Quantizer
from gradcodec.learned.spectrum import LEVELS_PER_OCTAVE, Corrections, Spectrum
from gradcodec.learned.tables import LearnedTables
from gradcodec.transform import Transform

_HEADER = struct.Struct("<hh")
_STEPS_PER_OCTAVE = 64
_FINEST, _COARSEST = -100 * _STEPS_PER_OCTAVE, 100 * _STEPS_PER_OCTAVE
_MAX_SHIFT, _SILENT_SHIFT = 1000, np.iinfo(np.int16).min
_OWN_STEPS_PER_DEVIATION = 8
"""Without a budget: how many steps the mean coefficient is worth."""
_LARGEST = 1e15
"""Squares of such coefficients, summed, are still finite in float32."""
_PILOT_VALUES = 1 << 18
_GOOD_FILL = 0.995
_OCTAVES = 24
"""How far below the peak a step is sought."""
_SLOPE = 1.2
"""About how fast the logarithm of the bytes falls with that of the step."""


@dataclass(frozen=True)
class _Plan:
    """How one update is coded at one step; both ends know it once the header and the corrections are read."""

    step: int
    shift: int
    corrections: Corrections


class LearnedCodec:
    """``learned``: see the module. Serves budgets down to its header of 4 bytes."""

    num_streams = 1

    def __init__(
        self, layout: Layout, tables: LearnedTables, weights_digest: bytes, device: torch.device | str = "cpu"
    ) -> None:
        """``device`` is where all but the range coder works, and where decoded blocks lie."""
        self.layout = layout
        self.tables = tables
        self.id = codec_id("learned/3", weights_digest)
        self._weights_digest = weights_digest
        self._transform = Transform(layout, tables.leading, device)
        self._spectrum = Spectrum(layout, tables.expected, tables.any_rows, device)
        self._quantizer = Quantizer(dict(tables.coders), device)

    @classmethod
    def from_artifact(cls, artifact: Artifact, layout: Layout, device: torch.device | str = "cpu") -> LearnedCodec:
        """Serves any layout. Raises CodecError: the artifact's tensors are not this codec's."""
        return cls(layout, LearnedTables.from_tensors(artifact.tensors), bytes.fromhex(artifact.digest), device)

    def starting_from(self, priors: Mapping[str, Prior], moved_RC: Tensor | None) -> LearnedCodec:
        """The codec of one round, its directions along the width derived (``basis.py``); those of the artifact are
        not used. Raises CodecError: a prior is not this layout's."""
        tables = self.tables_from(priors, moved_RC)
        identity = self._weights_digest + sketch(tables.leading)
        codec = LearnedCodec(self.layout, tables, identity, self._transform.device)
        codec.tables = self.tables  # its transform holds the directions, in half the memory
        return codec

    def tables_from(self, priors: Mapping[str, Prior], moved_RC: Tensor | None) -> LearnedTables:
        """The tables of that codec. Raises CodecError: a prior is not this layout's."""
        leading = derive(self.layout, priors, moved_RC)
        return self.tables.for_directions(leading, {block.name: block.transposed for block in self.layout.blocks})

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """Principal axes of the last global update, ``[B, R, R]`` float32."""
        return principal_axes(global_update_RC, self.layout)

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        return (self._encoder(blocks_RC, max_bytes, side).fill(max_bytes).codes,)

    def encode_with_decoded(
        self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None
    ) -> tuple[Codes, Tensor]:
        encoder = self._encoder(blocks_RC, max_bytes, side)
        written = encoder.fill(max_bytes)
        return (written.codes,), self._transform.synthesise(encoder.restored(written), side)

    def _encoder(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> _Encoder:
        if max_bytes is not None and max_bytes < _HEADER.size:
            raise BudgetError(f"{max_bytes} bytes for the codes; the learned codec needs at least {_HEADER.size}")
        coefficients_RC = self._transform.analyse(blocks_RC, side)
        peak = float(torch.linalg.vector_norm(coefficients_RC, math.inf))
        if not peak <= _LARGEST:
            raise DivergedError(f"the update holds values of {peak:.3g}, more than {_LARGEST:.0e}: training diverged")
        return _Encoder(self._spectrum, self._quantizer, coefficients_RC, peak)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        data = codes[0]
        if len(data) < _HEADER.size:
            raise CodecError(f"{len(data)} bytes of codes: the header alone takes {_HEADER.size}")
        step, shift = _HEADER.unpack_from(data)
        coefficients_RC = torch.zeros(self.layout.rank, self.layout.num_columns, device=self._transform.device)
        if shift == _SILENT_SHIFT:
            return coefficients_RC
        if not _FINEST <= step <= _COARSEST or abs(shift) > _MAX_SHIFT:
            raise CodecError(f"a step of 2 ** {step / _STEPS_PER_OCTAVE} or a shift of {shift} is out of range")
        reader = SymbolReader(data[_HEADER.size :])
        plan = _Plan(step, shift, self._spectrum.unpack(reader))
        for row, levels_C in enumerate(self._spectrum.levels(plan.corrections)):
            for symbol_class, positions_N in _positions(levels_C, shift):
                integers_N = torch.from_numpy(self._quantizer.unpack(reader, len(positions_N), symbol_class))
                coefficients_RC[row, positions_N] = self._quantizer.restore(
                    integers_N.to(positions_N.device), symbol_class
                )
        coefficients_RC *= _width_of(step)
        return self._transform.synthesise(coefficients_RC, side)


_Classified = tuple[int, Tensor]
"""A class, and coefficients that have it."""


@dataclass(frozen=True)
class _Written:
    """Codes, and what they were made of: integers in the order of the codes, on the coefficients' device."""

    codes: bytes
    plan: _Plan
    integers_N: Tensor


@dataclass(frozen=True)
class _Run:
    """Where a row's coefficients of one class lie, once they are sorted."""

    symbol_class: int
    row: int
    columns: slice


class _Encoder:
    """One update on its way into codes: the step is sought, everything else follows from it.

    The coefficients are used up: once their classes are fixed they are sorted by them, row by row.
    """

    def __init__(self, spectrum: Spectrum, quantizer: Quantizer, coefficients_RC: Tensor, peak: float) -> None:
        self._spectrum = spectrum
        self._quantizer = quantizer
        self._coefficients_RC = coefficients_RC
        self._energies_NS = spectrum.energies(coefficients_RC)
        self._silent = peak < _width_of(_FINEST)
        self._coarsest = _COARSEST if self._silent else min(_step_of(peak) + _STEPS_PER_OCTAVE, _COARSEST)
        self._stride = max(1, coefficients_RC.numel() // _PILOT_VALUES)
        self._pilot_N = coefficients_RC[:, :: self._stride].flatten()
        self._runs: list[_Run] = []

    def fill(self, max_bytes: int | None) -> _Written:
        """The codes of the finest step that fits."""
        if self._silent:
            return self._silence()
        if max_bytes is None:
            norm = float(torch.linalg.vector_norm(self._coefficients_RC, dtype=torch.float64))
            mean_deviation = norm / math.sqrt(self._coefficients_RC.numel())
            plan = self._plan(max(_step_of(mean_deviation / _OWN_STEPS_PER_DEVIATION), _FINEST))
            self._sort(plan)
            return self._write(plan)
        # corrections and shift move with the step, and the bytes jump: sought once with them, then with those found
        share = len(self._pilot_N) / self._coefficients_RC.numel()
        coarse = self._finest(
            max_bytes, lambda step: self._num_bytes(plan := self._plan(step), self._pilot(plan), share)
        )
        frozen = self._plan(coarse)
        pilot = [*self._pilot(frozen)]  # its classes are the same for every step
        step = self._finest(
            max_bytes, lambda step: self._num_bytes(dataclasses.replace(frozen, step=step), pilot, share), coarse
        )
        self._sort(frozen)
        if self._stride > 1:
            step = self._on_all(frozen, step, max_bytes)
        best: _Written | None = None
        while best is None and step <= self._coarsest:
            written = self._write(dataclasses.replace(frozen, step=step))
            best, step = (written if len(written.codes) <= max_bytes else None), step + 1
        if best is None:
            return self._silence()
        for finer in range(step - 2, step - 5, -1):
            if len(best.codes) >= _GOOD_FILL * max_bytes:
                break
            written = self._write(dataclasses.replace(frozen, step=finer))
            best = written if len(best.codes) < len(written.codes) <= max_bytes else best
        return best

    def restored(self, written: _Written) -> Tensor:
        """The coefficients that a decoder finds in the codes, to the bit, in their places."""
        coefficients_RC, stop = self._coefficients_RC.zero_(), 0
        if not len(written.integers_N):
            return coefficients_RC
        for row, levels_C in enumerate(self._spectrum.levels(written.plan.corrections)):
            for symbol_class, positions_N in _positions(levels_C, written.plan.shift):
                start, stop = stop, stop + len(positions_N)
                coefficients_RC[row, positions_N] = self._quantizer.restore(
                    written.integers_N[start:stop], symbol_class
                )
        return coefficients_RC.mul_(_width_of(written.plan.step))

    def _finest(self, max_bytes: int, num_bytes: Callable[[int], float], near: int | None = None) -> int:
        """The finest step that fits, sought outwards from one that is near it; finer steps take more, nearly always."""
        low, high = max(self._coarsest - _OCTAVES * _STEPS_PER_OCTAVE, _FINEST), self._coarsest
        candidate, reach = near, 1
        while high - low > 1:
            middle = (low + high) // 2 if candidate is None else min(max(candidate, low + 1), high - 1)
            fits = num_bytes(middle) <= max_bytes
            low, high = (low, middle) if fits else (middle, high)
            if candidate is not None and near is not None:
                turned = middle != near and fits != (middle < near)
                candidate, reach = (None if turned else middle - reach if fits else middle + reach), 2 * reach
        return high

    def _on_all(self, frozen: _Plan, step: int, max_bytes: int) -> int:
        """From a step found on a part of a large update to one that nearly fills the budget."""
        found: dict[int, float] = {}
        for _ in range(3):
            found[step] = self._num_bytes(dataclasses.replace(frozen, step=step), self._all())
            move = math.log2(found[step] / max_bytes) * _STEPS_PER_OCTAVE / _SLOPE
            if _GOOD_FILL * max_bytes <= found[step] <= max_bytes or step + math.ceil(move) in found:
                break
            step += math.ceil(move)
        return min((step for step, size in found.items() if size <= max_bytes), default=max(found) + 1)

    def _plan(self, step: int) -> _Plan:
        width = _width_of(step)
        corrections, loudness = self._spectrum.fit(self._energies_NS, width)
        shift = round(LEVELS_PER_OCTAVE * math.log2(max(loudness, 1e-300) / width**2))
        return _Plan(step, max(-_MAX_SHIFT, min(shift, _MAX_SHIFT)), corrections)

    def _pilot(self, plan: _Plan) -> Iterator[_Classified]:
        """Every so many-th column, all rows together: enough to judge a step by."""
        levels_N = torch.cat([*self._spectrum.levels(plan.corrections, self._stride)])
        for symbol_class, positions_N in _positions(levels_N, plan.shift):
            yield symbol_class, self._pilot_N[positions_N]

    def _sort(self, plan: _Plan) -> None:
        """Every row by class, in place and without what is silent. A row at a time, so that memory stays that of a
        row; from here on plans may differ by their steps alone."""
        for row, levels_C in enumerate(self._spectrum.levels(plan.corrections)):
            row_C, stop = self._coefficients_RC[row], 0
            for symbol_class, values_N in [(c, row_C[places_N]) for c, places_N in _positions(levels_C, plan.shift)]:
                start, stop = stop, stop + len(values_N)
                row_C[start:stop] = values_N
                self._runs.append(_Run(symbol_class, row, slice(start, stop)))

    def _all(self) -> Iterator[_Classified]:
        """Every coefficient, in the order of the codes."""
        for run in self._runs:
            yield run.symbol_class, self._coefficients_RC[run.row, run.columns]

    def _num_bytes(self, plan: _Plan, judged: Iterable[_Classified], share: float = 1.0) -> float:
        """What the codes take, judged by a share of all coefficients."""
        head = sum(float(bits_of(table)[symbols].sum()) for symbols, table in self._spectrum.pack(plan.corrections))
        scale = 1 / _width_of(plan.step)
        bits = 0.0
        for symbol_class, coefficients_N in judged:
            integers_N = self._quantizer.quantize(coefficients_N * scale, symbol_class)
            bits += self._quantizer.num_bits(integers_N, symbol_class)
        return _HEADER.size + (head + bits / share) / 8

    def _write(self, plan: _Plan) -> _Written:
        scale, stop = 1 / _width_of(plan.step), 0
        num = sum(run.columns.stop - run.columns.start for run in self._runs)
        integers_N = torch.empty(num, dtype=torch.int32, device=self._coefficients_RC.device)
        for symbol_class, coefficients_N in self._all():
            start, stop = stop, stop + len(coefficients_N)
            integers_N[start:stop] = self._quantizer.quantize(coefficients_N * scale, symbol_class)
        on_host: Symbols = integers_N.cpu().numpy()  # the only values of a payload that leave the device
        codes = _HEADER.pack(plan.step, plan.shift) + encode_symbols(self._parts(plan, on_host))
        return _Written(codes, plan, integers_N)

    def _parts(self, plan: _Plan, integers_N: Symbols) -> Iterator[tuple[Symbols, Table]]:
        yield from self._spectrum.pack(plan.corrections)
        stop = 0
        for run in self._runs:
            start, stop = stop, stop + run.columns.stop - run.columns.start
            yield from self._quantizer.pack(integers_N[start:stop], run.symbol_class)

    def _silence(self) -> _Written:
        """The codes of all-zero blocks."""
        plan = _Plan(0, _SILENT_SHIFT, self._spectrum.nothing())
        return _Written(_HEADER.pack(0, _SILENT_SHIFT), plan, torch.empty(0, dtype=torch.int32))


def _positions(levels_N: Tensor, shift: int) -> Iterator[tuple[int, Tensor]]:
    """Levels, which are used up -> from the lowest class to the highest where its coefficients are; silent ones are
    left out."""
    lowest = MIN_CLASS - 1  # silent
    classes_N = levels_N.clamp_(lowest - shift, MAX_CLASS - shift).add_(shift - lowest).byte()
    for symbol_class, count in enumerate(torch.bincount(classes_N).tolist()[1:], MIN_CLASS):
        if count:
            yield symbol_class, (classes_N == symbol_class - lowest).nonzero().squeeze(1)


def _width_of(step: int) -> float:
    return float(2.0 ** (step / _STEPS_PER_OCTAVE))


def _step_of(width: float) -> int:
    return math.floor(math.log2(width) * _STEPS_PER_OCTAVE)
