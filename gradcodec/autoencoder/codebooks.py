"""Codebooks: what the learned codec knows, as a network while it is trained and as tables once it is frozen.

A vector is a run of neighbouring values of one rotated row, divided by the row's scale. How finely a row is worth
coding is its *level*: its energy over the distortion that is allowed, in steps of 1.5 dB. Every level has a codebook
and an entropy model; a synthesis network turns a shared set of latent codewords into the codebook of a level, so
that neighbouring levels learn from each other (neural codebooks: Huijben et al. 2024, QINCo). The vectors are found
by search over codewords, distortion plus lambda times bits (entropy-constrained vector quantisation: Chou,
Lookabaugh, Gray 1989).

Shape suffixes: L levels, K codewords, D values a vector, N vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradcodec.entropy import Table

LEVELS_PER_OCTAVE = 2  # 3 dB of energy are two levels
MIN_LEVEL, MAX_LEVEL = -4, 24
NUM_CODEWORDS = 256


@dataclass(frozen=True)
class Band:
    """Levels ``first`` to ``last`` that share one vector length, so that 256 codewords are enough for each."""

    first: int
    last: int
    length: int

    @property
    def num_levels(self) -> int:
        return self.last - self.first + 1


BANDS = (Band(MIN_LEVEL, 1, 8), Band(2, 6, 4), Band(7, 13, 2), Band(14, MAX_LEVEL, 1))


def band_of(level: int) -> Band:
    assert MIN_LEVEL <= level <= MAX_LEVEL
    return next(band for band in BANDS if level <= band.last)


def price_of_a_bit(level: int) -> float:
    """Lambda: the squared error, in units of the row's energy, that one bit must save at this level.

    The slope of the Gaussian rate-distortion function where its distortion is the one allowed.
    """
    return 2 * math.log(2) * math.pow(2, -level / LEVELS_PER_OCTAVE)


@dataclass(frozen=True)
class Codebook:
    """One level's codewords ``[K, D]`` float32, in units of the row's scale, and their frozen frequencies."""

    codewords_KD: Tensor
    table: Table
    bits_K: Tensor

    def search(self, vectors_ND: Tensor, price: float, batch: int = 1 << 15) -> Tensor:
        """The cheapest codeword of each vector, squared error plus ``price`` times bits: ``[N]`` int64."""
        offsets_K = (self.codewords_KD**2).sum(1) + price * self.bits_K
        chosen = [
            torch.addmm(offsets_K, part_ND, self.codewords_KD.T, alpha=-2.0).argmin(1)
            for part_ND in vectors_ND.split(batch)
        ]
        return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)


class SynthesisNetwork(nn.Module):
    """Latent codewords and a level -> the codebook and the entropy model of that level."""

    def __init__(self, band: Band, hidden: int = 64) -> None:
        super().__init__()
        self.band = band
        self.latents_KD = nn.Parameter(torch.randn(NUM_CODEWORDS, band.length))
        self.network = nn.Sequential(
            nn.Linear(band.length + 2, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()
        )
        self.shift = nn.Linear(hidden, band.length)
        self.logit = nn.Linear(hidden, 1)
        self.bias_LK = nn.Parameter(torch.zeros(band.num_levels, NUM_CODEWORDS))
        for head in (self.shift, self.logit):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Codewords ``[L, K, D]`` and log2-probabilities ``[L, K]`` of all levels of the band."""
        position_L = torch.linspace(-1, 1, self.band.num_levels) if self.band.num_levels > 1 else torch.zeros(1)
        latents_LKD = self.latents_KD.expand(self.band.num_levels, -1, -1)
        position_LK1 = position_L[:, None, None].expand(-1, NUM_CODEWORDS, 1)
        norm_LK1 = latents_LKD.norm(dim=2, keepdim=True)
        features = self.network(torch.cat([latents_LKD, norm_LK1, position_LK1], dim=2))
        logits_LK = self.logit(features).squeeze(2) + self.bias_LK
        return latents_LKD + self.shift(features), torch.log_softmax(logits_LK, dim=1) / math.log(2)
