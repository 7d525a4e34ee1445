"""Trains the learned codec on recorded updates. Torch only: no files.

What is learned from a few updates fits them better than those to come: a basis gathers their energy, and tables
learned behind it would promise too much. So everything behind the basis is cross-fitted, each half of the updates
seen through the basis of the other half.

Shape suffixes: R rank, C columns, W width of one block, K leading directions, M magnitudes, N values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.layout import Layout
from gradcodec.learned.quantizer import (
    CLASSES,
    MAX_CLASS,
    MIN_CLASS,
    ClassCoder,
    Quantizer,
    expected_counts,
    first_coder,
    frozen_coder,
)
from gradcodec.learned.spectrum import LEVELS_PER_OCTAVE, Expected, Spectrum
from gradcodec.learned.tables import LearnedTables
from gradcodec.training.fit import Fitting, Progress
from gradcodec.training.recording import side_information_of
from gradcodec.transform import MIN_WIDTH, Transform, leading_directions

_STEPS = (-6, -4, -3, -2, -1, 0, 1, 2, 4)
"""Steps that training tries, in octaves of energy over the mean coefficient's."""
_FAITH = 50.0
"""How many values the formula's shares of magnitudes count for beside what was seen."""
_SMOOTHING = 0.12
"""Width of the kernel over the logarithm of a column's number, by which columns share what they know."""


@dataclass(frozen=True)
class Sample:
    """One recorded update as blocks ``[R, C]``, with the side information of its round."""

    blocks_RC: Tensor
    side: Tensor | None


@dataclass(frozen=True)
class DerivedSample:
    """One recorded update of any layout, with the directions that both ends would derive for its round."""

    layout: Layout
    sample: Sample
    leading: Mapping[str, Tensor]


def train(name: str, fitting: Fitting) -> Artifact:
    """``learned``: a ``Trainer``."""
    known = side_information_of(fitting.recording)
    tables = fit_learned(
        [Sample(update.blocks_RC, known[update.round]) for update in fitting.updates],
        fitting.recording.layout,
        directions=fitting.settings.directions,
        passes=fitting.settings.passes,
        progress=fitting.progress,
    )
    return Artifact(name, tables.to_tensors(), {"codec": {}, "trained": fitting.provenance})


def fit_learned(
    samples: Sequence[Sample],
    layout: Layout,
    *,
    directions: int = 96,
    passes: int = 6,
    progress: Progress | None = None,
) -> LearnedTables:
    """Trains bases, expected levels, entropy models and centroids. Nothing in it is random.

    Args:
        samples: what the codec is trained on.
        layout: theirs.
        directions: most leading directions along the width of a tensor; 0 leaves every tensor its own columns.
        passes: how often quantiser and entropy models are fitted to each other.
        progress: called after each pass; the loss is the cost of a value, squared error in steps plus bits.
    """
    assert samples
    assert passes > 0
    halves = [samples[0::2], samples[1::2]] if len(samples) > 1 else [samples, samples]
    bases = [_bases(half, layout, directions) for half in halves]
    coefficients = [
        Transform(layout, bases[1 - i]).analyse(sample.blocks_RC, sample.side)
        for i, half in enumerate(halves)
        for sample in half
    ]
    coefficients = [c / c.square().mean().sqrt() for c in coefficients if bool(c.any())]
    leading = _bases(samples, layout, directions)
    if not coefficients:
        return LearnedTables({c: first_coder(c) for c in CLASSES}, (0,))
    expected = {
        block.name: _expected(
            [c[: block.rank, block.start : block.stop] for c in coefficients],
            leading[block.name].shape[1] if block.name in leading else 0,
        )
        for block in layout.blocks
    }
    spectrum = Spectrum(layout, expected, (0,))
    levels_RC = torch.stack([*spectrum.levels(spectrum.nothing())]).int()
    classes = {octaves: levels_RC - LEVELS_PER_OCTAVE * octaves for octaves in _STEPS}
    coders = {c: first_coder(c) for c in CLASSES}
    for number in range(1, passes + 1):
        coders, cost = _refit(coders, coefficients, [classes] * len(coefficients))
        if progress is not None:
            progress(number, passes, cost)
    return LearnedTables(coders, _any_rows(expected), expected, leading)


def fit_general(
    samples: Sequence[DerivedSample], *, passes: int = 6, progress: Progress | None = None
) -> LearnedTables:
    """Trains what serves every model whose directions are derived: levels by the number of row and direction, entropy
    models and centroids. Nothing in it is random.

    Args:
        samples: of several models, ranks and kinds of update, one of them at least not zero.
        passes: as for ``fit_learned``.
        progress: likewise.
    """
    analysed = [
        (one, Transform(one.layout, one.leading).analyse(one.sample.blocks_RC, one.sample.side)) for one in samples
    ]
    analysed = [(one, c / c.square().mean().sqrt()) for one, c in analysed if bool(c.any())]
    assert analysed
    most = max(basis_WK.shape[1] for one in samples for basis_WK in one.leading.values())
    squares: list[list[Tensor]] = [[], []]  # of A and of B: by number of direction, and the mean of all that follow
    rows: dict[int, list[Tensor]] = {}  # by rank
    for one, c in analysed:
        for block in one.layout.blocks:
            squares_RW = c[: block.rank, block.start : block.stop].double().square()
            if block.name not in one.leading or not bool(squares_RW.any()):
                continue
            rows.setdefault(block.rank, []).append(squares_RW.mean(1) / squares_RW.mean())
            if one.leading[block.name].shape[1] == most:
                columns_W = squares_RW.mean(0) / squares_RW.mean()
                squares[block.transposed].append(torch.cat([columns_W[:most], columns_W[most:].mean()[None]]))
    any_columns = tuple(_levels(_smooth(torch.stack(kind).mean(0))) if kind else (0,) for kind in squares)
    by_rank = {str(rank): Expected(_levels(torch.stack(found).mean(0)), (0,)) for rank, found in rows.items()}
    tables = LearnedTables({c: first_coder(c) for c in CLASSES}, _any_rows(by_rank), any_columns=any_columns)
    classes = []
    for one, c in analysed:
        of_layout = tables.for_directions(one.leading, {block.name: block.transposed for block in one.layout.blocks})
        classes.append(_as_encoded(Spectrum(one.layout, of_layout.expected, tables.any_rows), c))
    coders = dict(tables.coders)
    for number in range(1, passes + 1):
        coders, cost = _refit(coders, [c for _, c in analysed], classes)
        if progress is not None:
            progress(number, passes, cost)
    return LearnedTables(coders, tables.any_rows, any_columns=any_columns)


def _bases(samples: Sequence[Sample], layout: Layout, directions: int) -> dict[str, Tensor]:
    bases = {}
    for block in layout.blocks:
        parts = [s.blocks_RC[: block.rank, block.start : block.stop] for s in samples]
        rows_NW = torch.cat([part / part.norm() for part in parts if float(part.norm()) > 0] or parts)
        if block.width >= MIN_WIDTH and directions > 0 and bool(rows_NW.any()):
            bases[block.name] = leading_directions(rows_NW, directions)
    return bases


def _expected(parts: Sequence[Tensor], num_leading: int) -> Expected:
    """Levels of one tensor's rows and columns, from its coefficients ``[R, W]`` in all updates."""
    squares_RW = torch.stack([part.double().square() for part in parts]).mean(0)
    columns_W = squares_RW.mean(0)
    overall = max(float(columns_W.mean()), 1e-30)
    smooth_K = _smooth(torch.cat([columns_W[:num_leading], columns_W[num_leading:].mean()[None]]))
    columns = _levels(smooth_K / overall)
    expected_W = torch.cat([smooth_K[:-1], smooth_K[-1:].expand(len(columns_W) - num_leading)]).clamp_min(1e-30)
    whitened_RW = squares_RW / expected_W * overall
    return Expected(_levels(whitened_RW.mean(1)), columns)


def _smooth(energies_K: Tensor) -> Tensor:
    """Of leading directions, and of all that follow, which stays as it is."""
    log_number_K = torch.log(torch.arange(len(energies_K) - 1) + 4.0).double()
    kernel_KK = torch.exp(-((log_number_K[:, None] - log_number_K) / _SMOOTHING).square())
    return torch.cat([(kernel_KK / kernel_KK.sum(1, keepdim=True)) @ energies_K[:-1], energies_K[-1:]])


def _levels(energies: Tensor) -> tuple[int, ...]:
    levels = (LEVELS_PER_OCTAVE * energies.clamp_min(1e-30).log2()).round().clamp(-100, 100)
    return tuple(int(level) for level in levels)


def _any_rows(expected: dict[str, Expected]) -> tuple[int, ...]:
    """Levels of rows by rank over all tensors, the mean taken out: what an unknown tensor starts from."""
    rank = max(len(e.rows) for e in expected.values())
    means = [np.mean([e.rows[r] for e in expected.values() if r < len(e.rows)]) for r in range(rank)]
    return tuple(round(float(level - np.mean(means))) for level in means)


def _as_encoded(spectrum: Spectrum, coefficients_RC: Tensor) -> dict[int, Tensor]:
    """Step in octaves -> classes as a payload of that step has them, its corrections included: tables learned without
    those would expect far more spread within a class than there is."""
    energies_NS = spectrum.energies(coefficients_RC)
    found = {}
    for octaves in _STEPS:
        corrections, loudness = spectrum.fit(energies_NS, 2.0 ** (octaves / 2))
        shift = round(LEVELS_PER_OCTAVE * (math.log2(loudness) - octaves))
        levels_RC = torch.stack([*spectrum.levels(corrections)]).int()
        found[octaves] = (levels_RC + shift).clamp(MIN_CLASS - 1, MAX_CLASS).to(torch.int8)
    return found


def _refit(
    coders: dict[int, ClassCoder], coefficients: Sequence[Tensor], classes: Sequence[Mapping[int, Tensor]]
) -> tuple[dict[int, ClassCoder], float]:
    """Quantises everything with these coders, and fits coders to what came out.

    Args:
        coders: by class.
        coefficients: ``[R, C]``, their mean square 1.
        classes: for each of them, step in octaves -> the classes at that step ``[R, C]``.
    """
    quantizer = Quantizer(coders)
    counts: dict[int, NDArray[np.float64]] = {}
    sums: dict[int, Tensor] = {}
    total_error, total_bits, num_values = 0.0, 0.0, 0
    for coefficients_RC, at_step in zip(coefficients, classes, strict=True):
        for octaves, classes_RC in at_step.items():
            for c in CLASSES:
                values_N = coefficients_RC[classes_RC == c] * 2.0 ** (-octaves / 2)
                if not len(values_N):
                    continue
                symbols_N = quantizer.quantize(values_N, c)
                magnitudes_N = symbols_N.abs().clamp_max(coders[c].largest).long()
                size = coders[c].largest + 1
                counts[c] = counts.get(c, np.zeros(size)) + np.bincount(magnitudes_N.numpy(), minlength=size)
                added_M = torch.zeros(size).index_add_(0, magnitudes_N, values_N.abs().clamp_max(size - 0.5))
                sums[c] = sums[c] + added_M if c in sums else added_M
                total_error += float((quantizer.restore(symbols_N, c) - values_N).square().sum())
                total_bits += quantizer.num_bits(symbols_N, c)
                num_values += len(values_N)
    cost = (total_error + total_bits) / max(num_values, 1)
    return {c: _fitted(c, coders[c], counts.get(c), sums.get(c)) for c in CLASSES}, cost


def _fitted(
    symbol_class: int, coder: ClassCoder, counts_M: NDArray[np.float64] | None, sums_M: Tensor | None
) -> ClassCoder:
    if counts_M is None or sums_M is None:
        return coder
    blended_M = counts_M + _FAITH * expected_counts(symbol_class)
    magnitudes_M = torch.arange(len(counts_M), dtype=torch.float32)
    seen_M = torch.from_numpy(counts_M).float()
    # a centroid lies within half a step of its magnitude; rare ones stay there
    centroids_M = ((sums_M + 4 * magnitudes_M) / (seen_M + 4)).clamp(magnitudes_M - 0.5, magnitudes_M + 0.5)
    centroids_M[0] = 0.0
    return frozen_coder(blended_M, centroids_M)
