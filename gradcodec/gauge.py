"""Gauge: the rotation of a block's rows into principal axes, and back.

A LoRA pair is defined up to an invertible ``r x r`` matrix (``B Q^-1 Q A = B A``), and its gradients are strongly
low-rank inside each factor: rotated into the principal axes of the last global update, which both ends know, most of
a block's energy lies in its first rows. The rotation costs no uplink bytes.

Shape suffixes: B blocks, R rank, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.layout import Layout

_FAINT = 1e-8
"""Share of the energy by which axes are told apart that are equally strong, or hold nothing: else each library would
take others."""


def principal_axes(blocks_RC: Tensor, layout: Layout) -> Tensor:
    """``[B, R, R]`` float32: per block an orthogonal matrix whose rows are its principal axes, strongest first.

    Rows beyond a block's own rank hold nothing and stay where they are, as does a block that is zero.
    """
    axes_BRR = torch.eye(layout.rank, dtype=torch.float64).repeat(len(layout.blocks), 1, 1)
    for axes_RR, block in zip(axes_BRR, layout.blocks, strict=True):
        rows = blocks_RC[: block.rank, block.start : block.stop].double()
        if bool(rows.any()):
            gram_KK = rows @ rows.T
            place_K = torch.arange(block.rank, 0, -1, dtype=torch.float64) / block.rank
            gram_KK += (_FAINT * gram_KK.trace()) * place_K.diag()
            axes_RR[: block.rank, : block.rank] = _one_sign(torch.linalg.eigh(gram_KK)[1].flip(-1).T)
    return axes_BRR.float()


def _one_sign(axes_KK: Tensor) -> Tensor:
    """The axes, each turned so that its values grow with their place rather than fall: libraries differ in signs."""
    place_K = torch.arange(1, axes_KK.shape[1] + 1, dtype=axes_KK.dtype).sqrt()
    return axes_KK * torch.where(axes_KK @ place_K < 0, -1.0, 1.0)[:, None]


def rotate(blocks_RC: Tensor, axes_BRR: Tensor, layout: Layout) -> Tensor:
    """Blocks in their own axes: row k of a block is its part along axis k."""
    rotated_RC = torch.empty_like(blocks_RC)
    for axes_RR, block in zip(axes_BRR, layout.blocks, strict=True):
        rotated_RC[:, block.start : block.stop] = axes_RR @ blocks_RC[:, block.start : block.stop]
    return rotated_RC


def unrotate(rotated_RC: Tensor, axes_BRR: Tensor, layout: Layout) -> Tensor:
    """Inverse of ``rotate``, in place: gives the same tensor."""
    for axes_RR, block in zip(axes_BRR, layout.blocks, strict=True):
        part = rotated_RC[:, block.start : block.stop]
        part.copy_(axes_RR.T @ part)
    return rotated_RC
