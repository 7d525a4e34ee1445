"""The linear half of the learned codec: analysis (blocks -> coefficients) and synthesis (back), both orthogonal.

Along the rank every block is rotated into shared principal axes (``gauge.py``). Along the width it is rotated into a
basis that TGAP learned for this tensor: A's gradients lie where the layer's inputs do, B's where its output gradients
do, and both directions hold over rounds and clients. Only the strongest directions are learned; a block Householder
reflection completes them to an orthogonal basis, so that a width of 4096 takes 64 vectors and not 4096.

A tensor that TGAP did not see, or saw with another width, keeps its own columns: the codec serves it all the same.

Shape suffixes: R rank, C columns of all blocks, W width of one block, K leading directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.gauge import rotate, unrotate
from gradcodec.layout import Layout

_NEARLY_SINGULAR = 1e-2
MIN_WIDTH = 16
"""Narrower blocks keep their columns: there is nothing to gather."""


class Reflection:
    """An orthogonal matrix ``H [W, W]`` whose first K columns are given, kept as ``[W, K]``.

    ``H = I - Y S^-1 Y^T`` with ``Y = E - V`` and ``S = Y^T E`` maps the first K unit vectors E to V (block
    Householder: Schreiber and Parlett 1988, "Block reflectors: theory and computation").
    """

    def __init__(self, leading_WK: Tensor, device: torch.device | str = "cpu") -> None:
        """``leading_WK``: orthonormal, in float64 or rounded to less; the result lies on ``device``."""
        width, count = leading_WK.shape
        orthonormal_WK = leading_WK.double()
        if leading_WK.dtype != torch.float64:
            orthonormal_WK, upper_KK = torch.linalg.qr(orthonormal_WK)  # undoes the rounding
            orthonormal_WK = orthonormal_WK * torch.sign(upper_KK.diagonal())
        # the sign of a direction is free: a negative diagonal keeps S far from singular, nearly always
        orthonormal_WK = orthonormal_WK * -torch.where(orthonormal_WK.diagonal() < 0, -1.0, 1.0)
        unit_WK = torch.eye(width, count, dtype=torch.float64)
        if float(torch.linalg.svdvals((unit_WK - orthonormal_WK)[:count])[-1]) < _NEARLY_SINGULAR:
            orthonormal_WK = orthonormal_WK * _safe_signs(orthonormal_WK[:count])
        difference_WK = unit_WK - orthonormal_WK
        self._difference_WK = difference_WK.float().to(device)
        self._inner_KK = torch.linalg.inv(difference_WK[:count]).T.float().to(device)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows ``[..., W]`` -> their coordinates: the leading directions first."""
        turned: Tensor = rows - ((rows @ self._difference_WK) @ self._inner_KK) @ self._difference_WK.T
        return turned

    def inverse(self, rows: Tensor) -> Tensor:
        """Inverse of ``forward``."""
        turned: Tensor = rows - ((rows @ self._difference_WK) @ self._inner_KK.T) @ self._difference_WK.T
        return turned


def _safe_signs(top_KK: Tensor) -> Tensor:
    """Signs ``[K]`` of columns with which ``I - top * signs`` is far from singular, whatever the columns: each is
    chosen against its pivot in an elimination without pivoting (Ballard et al. 2014, "Reconstructing Householder
    vectors from tall-skinny QR", section 4)."""
    rest_KK = top_KK.clone()
    signs_K = torch.ones(len(rest_KK), dtype=rest_KK.dtype)
    for k in range(len(rest_KK)):
        signs_K[k] = 1.0 if rest_KK[k, k] < 0 else -1.0
        rest_KK[k, k] -= signs_K[k]
        rest_KK[k + 1 :, k] /= rest_KK[k, k]
        rest_KK[k + 1 :, k + 1 :] -= torch.outer(rest_KK[k + 1 :, k], rest_KK[k, k + 1 :])
    return signs_K


class Transform:
    """Analysis and synthesis for one layout."""

    def __init__(self, layout: Layout, leading: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """``leading``: tensor name -> its strongest directions along the width, ``[W, K]``. What both directions give
        lies on ``device``."""
        self.layout = layout
        self.device = device
        self._reflections: list[Reflection | None] = []
        for block in layout.blocks:
            basis_WK = leading.get(block.name)
            fits = basis_WK is not None and len(basis_WK) == block.width
            self._reflections.append(Reflection(basis_WK, device) if fits and basis_WK is not None else None)

    def analyse(self, blocks_RC: Tensor, side: Tensor | None) -> Tensor:
        """Blocks -> coefficients, ``[R, C]`` both."""
        rotated_RC = rotate(blocks_RC.to(self.device), self._axes(side), self.layout)
        for block, reflection in zip(self.layout.blocks, self._reflections, strict=True):
            if reflection is not None:
                part = rotated_RC[:, block.start : block.stop]
                part.copy_(reflection.forward(part))
        return rotated_RC

    def synthesise(self, coefficients_RC: Tensor, side: Tensor | None) -> Tensor:
        """Coefficients, which are used up, -> blocks; inverse of ``analyse``."""
        rotated_RC = coefficients_RC
        for block, reflection in zip(self.layout.blocks, self._reflections, strict=True):
            if reflection is not None:
                part = rotated_RC[:, block.start : block.stop]
                part.copy_(reflection.inverse(part))
        return unrotate(rotated_RC, self._axes(side), self.layout)

    def _axes(self, side: Tensor | None) -> Tensor:
        shape = (len(self.layout.blocks), self.layout.rank, self.layout.rank)
        if side is None:
            return torch.eye(self.layout.rank, device=self.device).expand(shape)
        if tuple(side.shape) != shape or not bool((side.abs() <= 1.001).all()):
            raise CodecError(f"side information of shape {tuple(side.shape)}: rotations of shape {shape} are expected")
        return side.to(self.device)


def leading_directions(rows_NW: Tensor, most: int) -> Tensor:
    """The strongest directions of recorded rows, ``[W, K]`` float16, at most ``most`` and half of the width."""
    count = min(most, rows_NW.shape[1] // 2, len(rows_NW))
    directions_NW = torch.linalg.svd(rows_NW.double(), full_matrices=False)[2]
    strongest_WK: Tensor = directions_NW[:count].T.half().contiguous()
    return strongest_WK
