"""Directions along the width that both ends derive, so that none of them travels.

What is known of where a tensor's updates will lie: a *prior*, which comes with the base model that both ends hold, and
how the global adapter moved since its start, which both ends hold, too. Directions are the strongest of both. No float
of them decides an integer: levels and tables are the artifact's. Ends that agree to 1e-6 understand each other, and a
sketch of the directions, which goes into the codec's id, lets no others.

Shape suffixes: R rank, C columns of all blocks, W width of one block, K directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.layout import Block, Layout
from gradcodec.transform import MIN_WIDTH

MOST_DIRECTIONS = 96
_WEIGHT_OF_PRIOR, _WEIGHT_OF_MOVE = 8.0, 3.0
"""Both have unit energy. On recorded updates of SmolLM2 anything from 4 to 16 to 1 is as good."""
_FAINTEST = 1e-9
"""Share of the energy below which a direction is rounding."""
_SKETCH_STEP = 2.0**-6


@dataclass(frozen=True)
class Prior:
    """Of one block: directions ``[W, K]``, orthonormal, and the share of the energy that each is expected to hold
    ``[K]``, at least 0."""

    directions_WK: Tensor
    shares_K: Tensor


def derive(
    layout: Layout, priors: Mapping[str, Prior], moved_RC: Tensor | None, most: int = MOST_DIRECTIONS
) -> dict[str, Tensor]:
    """Block name -> its leading directions ``[W, K]`` float64, at most ``most`` and half of the width; without the
    blocks of which nothing is known.

    Args:
        layout: of the adapter.
        priors: by block name; those of blocks that the layout does not have are left out.
        moved_RC: the global adapter less the one that the run started from, as blocks ``[R, C]``; None: not known.

    Raises:
        CodecError: a prior has another width than its block.
    """
    found = {}
    for block in layout.blocks:
        known = [*_of_prior(block, priors.get(block.name)), *_of_move(block, moved_RC)]
        if known and block.width >= MIN_WIDTH:
            strongest_WK = _strongest(torch.cat(known, 1), min(most, block.width // 2))
            if strongest_WK.shape[1]:
                found[block.name] = strongest_WK
    return found


def sketch(leading: Mapping[str, Tensor]) -> bytes:
    """A few bytes that stand for directions: equal if they differ by rounding alone, for any signs."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for name in sorted(leading):
        width, count = leading[name].shape
        probe_W = torch.randn(width, dtype=torch.float64, generator=generator)
        weights_K = torch.rand(count, dtype=torch.float64, generator=generator)
        total += float(weights_K @ (probe_W @ leading[name].double().cpu()).square())
    return round(total / _SKETCH_STEP).to_bytes(8, "little")


def _of_prior(block: Block, prior: Prior | None) -> list[Tensor]:
    if prior is None:
        return []
    if len(prior.directions_WK) != block.width:
        raise CodecError(
            f"the prior of {block.name!r} is {len(prior.directions_WK)} wide, the block {block.width}: another model?"
        )
    return [prior.directions_WK.double() * (_WEIGHT_OF_PRIOR * prior.shares_K.double()).sqrt()]


def _of_move(block: Block, moved_RC: Tensor | None) -> list[Tensor]:
    if moved_RC is None or block.is_vector:  # DoRA's starts as norms that machines sum up alike to rounding alone
        return []
    rows_RW = moved_RC[: block.rank, block.start : block.stop].double().cpu()
    norm = float(rows_RW.norm())
    return [rows_RW.T * (_WEIGHT_OF_MOVE**0.5 / norm)] if norm > 0 else []


def _strongest(known_WN: Tensor, most: int) -> Tensor:
    """The leading left singular vectors, from the small Gram matrix."""
    energies_N, inner_NN = torch.linalg.eigh(known_WN.T @ known_WN)
    count = min(most, int((energies_N > _FAINTEST * energies_N[-1]).sum()))
    leading_WK: Tensor = known_WN @ (inner_NN[:, -count:] / energies_N[-count:].sqrt()) if count else known_WN[:, :0]
    return leading_WK.flip(1)
