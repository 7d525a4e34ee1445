"""Trains the learned codec on recorded updates. Torch only: no files.

What is learned from a few updates fits them better than those to come: a basis gathers their energy, and tables
learned behind it would promise too much. So everything behind the basis is cross-fitted, each half of the updates
seen through the basis of the other half.

Shape suffixes: R rank, C columns, W width of one block, K leading directions, M magnitudes, N values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.layout import Layout
from gradcodec.learned.quantizer import (
    CLASSES,
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
    coders = {c: first_coder(c) for c in CLASSES}
    for number in range(1, passes + 1):
        coders, cost = _refit(coders, coefficients, levels_RC)
        if progress is not None:
            progress(number, passes, cost)
    return LearnedTables(coders, _any_rows(expected), expected, leading)


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
    log_number_K = torch.log(torch.arange(num_leading) + 4.0).double()
    kernel_KK = torch.exp(-((log_number_K[:, None] - log_number_K) / _SMOOTHING).square())
    leading_K = (kernel_KK / kernel_KK.sum(1, keepdim=True)) @ columns_W[:num_leading]
    tail = columns_W[num_leading:].mean()[None]
    columns = _levels(torch.cat([leading_K, tail]) / overall)
    expected_W = torch.cat([leading_K, tail.expand(len(columns_W) - num_leading)]).clamp_min(1e-30)
    whitened_RW = squares_RW / expected_W * overall
    return Expected(_levels(whitened_RW.mean(1)), columns)


def _levels(energies: Tensor) -> tuple[int, ...]:
    levels = (LEVELS_PER_OCTAVE * energies.clamp_min(1e-30).log2()).round().clamp(-100, 100)
    return tuple(int(level) for level in levels)


def _any_rows(expected: dict[str, Expected]) -> tuple[int, ...]:
    """Levels of rows by rank over all tensors, the mean taken out: what an unknown tensor starts from."""
    rank = max(len(e.rows) for e in expected.values())
    means = [np.mean([e.rows[r] for e in expected.values() if r < len(e.rows)]) for r in range(rank)]
    return tuple(round(float(level - np.mean(means))) for level in means)


def _refit(
    coders: dict[int, ClassCoder], coefficients: Sequence[Tensor], levels_RC: Tensor
) -> tuple[dict[int, ClassCoder], float]:
    """Quantises everything with these coders, and fits coders to what came out."""
    quantizer = Quantizer(coders)
    counts: dict[int, NDArray[np.float64]] = {}
    sums: dict[int, Tensor] = {}
    total_error, total_bits, num_values = 0.0, 0.0, 0
    for coefficients_RC in coefficients:
        for octaves in _STEPS:
            classes_RC = levels_RC - LEVELS_PER_OCTAVE * octaves
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
