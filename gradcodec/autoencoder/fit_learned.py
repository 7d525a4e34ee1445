"""Trains the learned codec on recorded updates. Torch only: no files, no progress of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradcodec.autoencoder.codebooks import (
    BANDS,
    LEVELS_PER_OCTAVE,
    MAX_LEVEL,
    MIN_LEVEL,
    NUM_CODEWORDS,
    Codebook,
    SynthesisNetwork,
    price_of_a_bit,
)
from gradcodec.autoencoder.learned import SILENT, LearnedTables, frozen_scale_table, piece_scale
from gradcodec.autoencoder.transform import Transform, fit_bases
from gradcodec.entropy import Table, bits_of, integer_table
from gradcodec.layout import Layout

Progress = Callable[[int, int, float], None]
"""Called with steps done, steps in all, and the loss."""


@dataclass(frozen=True)
class Sample:
    """One recorded update as blocks ``[R, C]``, with the side information of its round."""

    blocks_RC: Tensor
    side: Tensor | None


def fit_learned(
    samples: Sequence[Sample], layout: Layout, *, steps: int, seed: int, progress: Progress | None = None
) -> LearnedTables:
    """Trains the codebooks of all levels.

    Args:
        samples: what the codec is trained on.
        layout: theirs.
        steps: optimizer steps for each of the bands.
        seed: of everything random.
    """
    assert samples
    assert steps > 0
    bases = fit_bases([sample.blocks_RC for sample in samples], layout)
    rows, exponents = _normalised_pieces(samples, Transform(layout, bases))
    generator = torch.Generator().manual_seed(seed)
    codebooks: dict[int, Codebook] = {}
    for number, band in enumerate(BANDS):
        pool_ND = _vector_pool(rows, band.length, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            network = SynthesisNetwork(band)

        def report(step: int, loss: float, number: int = number) -> None:
            if progress is not None:
                progress(number * steps + step, len(BANDS) * steps, loss)

        _train(network, pool_ND, steps, generator, report)
        codebooks.update(_freeze(network, pool_ND))
    return LearnedTables(codebooks, _scale_table(exponents), bases)


def _normalised_pieces(samples: Sequence[Sample], transform: Transform) -> tuple[list[Tensor], list[Tensor]]:
    """Every piece over its scale, and per sample the exponents of its rows."""
    pieces: list[Tensor] = []
    exponents: list[Tensor] = []
    for sample in samples:
        coefficients_RC = transform.analyse(sample.blocks_RC, sample.side)
        exponent = transform.row_exponents(coefficients_RC)
        exponents.append(torch.tensor(exponent))
        for piece in transform.pieces:
            values = coefficients_RC[piece.rank, piece.start : piece.stop] / piece_scale(exponent[piece.row], piece)
            if bool(values.any()):
                pieces.append(values)
    return pieces, exponents


def _vector_pool(rows: list[Tensor], length: int, generator: torch.Generator, most: int = 1 << 17) -> Tensor:
    vectors_ND = torch.cat([row[: len(row) // length * length].reshape(-1, length) for row in rows])
    return vectors_ND[torch.randperm(len(vectors_ND), generator=generator)[:most]]


def _train(
    network: SynthesisNetwork,
    pool_ND: Tensor,
    steps: int,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> None:
    """Entropy-constrained: each vector pays for its cheapest codeword, in bits, plus its error over lambda."""
    _start_from_data(network, pool_ND, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=max(steps, 11), pct_start=0.1)
    levels = range(network.band.first, network.band.last + 1)
    price_L1 = torch.tensor([[price_of_a_bit(level)] for level in levels])
    for step in range(1, steps + 1):
        vectors_ND = pool_ND[torch.randint(len(pool_ND), (1024,), generator=generator)]
        codewords_LKD, log2_LK = network()
        discount = min(1.0, 2 * step / steps)  # bits are cheap at first, else all vectors fall to the zero codeword
        with torch.no_grad():
            error_LNK = torch.cdist(vectors_ND.expand(len(levels), -1, -1), codewords_LKD).square()
            chosen_LN = (error_LNK / price_L1[:, :, None] - discount * log2_LK[:, None, :]).argmin(2)
        picked_LND = torch.gather(codewords_LKD, 1, chosen_LN[:, :, None].expand(-1, -1, codewords_LKD.shape[2]))
        error_LN = (picked_LND - vectors_ND).square().sum(2)
        loss = (error_LN / price_L1 - torch.gather(log2_LK, 1, chosen_LN)).mean() / network.band.length
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, float(loss.detach()))


@torch.no_grad()
def _start_from_data(network: SynthesisNetwork, pool_ND: Tensor, generator: torch.Generator) -> None:
    """Latent codewords start as data, the silent one as zero."""
    network.latents_KD.copy_(pool_ND[torch.randint(len(pool_ND), (NUM_CODEWORDS,), generator=generator)])
    network.latents_KD[0] = 0.0


@torch.no_grad()
def _freeze(network: SynthesisNetwork, pool_ND: Tensor) -> dict[int, Codebook]:
    """Network -> tables: codewords as trained, frequencies as the search uses them on the training vectors."""
    codewords_LKD, log2_LK = network()
    codebooks: dict[int, Codebook] = {}
    for index, level in enumerate(range(network.band.first, network.band.last + 1)):
        probabilities = np.exp2(log2_LK[index].double().numpy())
        book = _book(codewords_LKD[index], probabilities)
        for _ in range(3):  # the entropy model and the search settle on each other
            chosen = book.search(pool_ND, price_of_a_bit(level))
            counts = torch.bincount(chosen, minlength=NUM_CODEWORDS).double().numpy()
            book = _book(codewords_LKD[index], counts + 0.25)
        codebooks[level] = book
    return codebooks


def _book(codewords_KD: Tensor, probabilities: NDArray[np.float64]) -> Codebook:
    table = integer_table(probabilities)
    return Codebook(codewords_KD.contiguous().clone(), table, torch.from_numpy(bits_of(table)).float())


def _scale_table(exponents: list[Tensor]) -> Table:
    """Frequencies of the scale symbols over updates and water marks."""
    counts = np.zeros(SILENT + 1)
    for exponent in exponents:
        symbols = (exponent.max() - exponent).clamp_max(SILENT).long()
        for water_mark in range(-MAX_LEVEL // 2, -MIN_LEVEL, 2):
            sent = torch.where(-LEVELS_PER_OCTAVE * symbols - water_mark < MIN_LEVEL, SILENT, symbols)
            counts += torch.bincount(sent, minlength=SILENT + 1).numpy()
    return frozen_scale_table(counts)
