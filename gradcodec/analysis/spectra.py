"""Singular values, entropy, tails and histograms of the factors A and B over the rounds of a recording.

What is measured of a factor depends on its gauge: ``(B Q)(Q^-1 A)`` is the same change of the model for any invertible
Q, and only singular values under orthogonal Q are the same as well. Recordings hold what changed in a round, not the
adapter. Shape suffixes: R rank, W width of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.analysis.places import A, B, factor_of
from gradcodec.layout import Layout
from gradcodec.training.recording import Recording

CLIENTS, GLOBAL = "clients", "global"
NUM_BINS, REACH = 41, 5.0
"""Of a histogram, and how many root mean squares it reaches to either side."""


@dataclass(frozen=True)
class Spectrum:
    """One factor in one round; means over blocks and, of ``clients``, over their updates. Blocks of zeros are left out.

    Attributes:
        of: ``clients``, each client's update by itself, or ``global``, their mean.
        round: which.
        factor: ``A`` or ``B``.
        shares: of the energy, by singular value, falling, ``[R]``: squares over their sum.
        entropy: of the shares, in nats ("matrix entropy").
        effective_rank: its exponential, from 1 to the rank (Roy and Vetterli 2007, of squares).
        kurtosis: excess, of a block's values; 0 for a Gaussian, negative for values of one size.
        rms: root mean square of the values.
        histogram: shares of the values over their block's rms, in ``NUM_BINS`` equal bins from -``REACH`` to ``REACH``;
            those beyond count in the last ones.
    """

    of: str
    round: int
    factor: str
    shares: tuple[float, ...]
    entropy: float
    effective_rank: float
    kurtosis: float
    rms: float
    histogram: tuple[float, ...]


def spectra(recording: Recording) -> list[Spectrum]:
    """Of every round and both factors, clients' and global. Vectors have no singular values and are left out."""
    rows = []
    for number in recording.rounds:
        single = [update.blocks_RC for update in recording.updates if update.round == number]
        for of, updates in ((CLIENTS, single), (GLOBAL, [torch.stack(single).mean(0)])):
            for factor in (A, B):
                parts = [part for blocks_RC in updates for part in _parts(blocks_RC, recording.layout, factor)]
                if parts:
                    rows.append(_spectrum_of(parts, of, number, factor))
    return rows


def _parts(blocks_RC: Tensor, layout: Layout, factor: str) -> Iterator[Tensor]:
    """The blocks of a factor that are not zero, in float64."""
    for block in layout.blocks:
        if factor_of(block) == factor:
            part_RW = blocks_RC[: block.rank, block.start : block.stop].double()
            if bool(part_RW.any()):
                yield part_RW


def _spectrum_of(parts: list[Tensor], of: str, number: int, factor: str) -> Spectrum:
    rank = max(part_RW.shape[0] for part_RW in parts)
    shares_R, histogram = torch.zeros(rank, dtype=torch.float64), torch.zeros(NUM_BINS, dtype=torch.float64)
    entropy = effective = kurtosis = square = 0.0
    for part_RW in parts:
        own_R = shares_of(part_RW)
        shares_R[: len(own_R)] += own_R
        own_entropy = entropy_of(own_R)
        entropy += own_entropy
        effective += math.exp(own_entropy)
        kurtosis += excess_kurtosis(part_RW)
        mean_square = float(part_RW.square().mean())
        square += mean_square
        histogram += (
            torch.histc((part_RW / mean_square**0.5).clamp(-REACH, REACH), NUM_BINS, min=-REACH, max=REACH)
            / part_RW.numel()
        )
    count = len(parts)
    return Spectrum(
        of,
        number,
        factor,
        tuple((shares_R / count).tolist()),
        entropy / count,
        effective / count,
        kurtosis / count,
        (square / count) ** 0.5,
        tuple((histogram / count).tolist()),
    )


def shares_of(part_RW: Tensor) -> Tensor:
    """Squared singular values of a matrix that is not zero over their sum, falling, float64."""
    squares: Tensor = torch.linalg.svdvals(part_RW.double()).square()
    return squares / squares.sum()


def entropy_of(shares_R: Tensor) -> float:
    """``-sum p ln p``, in nats."""
    return float(torch.special.entr(shares_R.double()).sum())


def excess_kurtosis(values: Tensor) -> float:
    """``E[(x - m)^4] / E[(x - m)^2]^2 - 3``; 0 for values that are all alike."""
    centred = values.double() - values.double().mean()
    square = float(centred.square().mean())
    return float(centred.pow(4).mean()) / square**2 - 3 if square > 0 else 0.0
