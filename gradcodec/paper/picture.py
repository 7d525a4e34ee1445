"""An update as one picture, zero-padded, and back: what the paper's networks see. Knows layouts, not networks.

Shape suffixes: R rank, C columns, H height and W width of the picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradcodec.layout import Layout
from gradcodec.paper.networks import STAGES

_SIDE = 2**STAGES


def picture_shape(num_parameters: int) -> tuple[int, int]:
    """Height and width, multiples of 64, about two to one: ``(4096, 2048)`` for LLaMA-7B at rank 8."""
    width = _SIDE * math.ceil(math.sqrt(num_parameters / 2) / _SIDE)
    return _SIDE * math.ceil(num_parameters / width / _SIDE), width


def to_picture(blocks_RC: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Blocks ``[R, C]`` over their scales, value after value, zero-padded: ``[H, W]``."""
    height, width = picture_shape(layout.num_parameters)
    widths = torch.tensor([block.width for block in layout.blocks])
    values = layout.flatten(blocks_RC / scales.repeat_interleave(widths))
    return nn.functional.pad(values, (0, height * width - len(values))).reshape(height, width)


def from_picture(picture_HW: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Inverse of ``to_picture``."""
    widths = torch.tensor([block.width for block in layout.blocks])
    values = picture_HW.flatten()[: layout.num_parameters]
    return layout.unflatten(values) * scales.repeat_interleave(widths)


def scales_of(blocks_RC: Tensor, layout: Layout, literal: bool) -> Tensor:
    """Per block what its values are divided by, ``[B]``: their root mean square, or 1 if ``literal``."""
    if literal:
        return torch.ones(len(layout.blocks))
    parts = [blocks_RC[: block.rank, block.start : block.stop] for block in layout.blocks]
    return torch.stack([part.square().mean().sqrt() for part in parts]).clamp_min(1e-20)
