"""Where in a model a block of an adapter lies: its layer, and which of the two LoRA factors it is, if it is one."""

from __future__ import annotations

import re

from gradcodec.layout import Block

A, B, VECTOR = "A", "B", "vector"
_LAYER = re.compile(r"(?:^|[._])(\d+)(?=[._])")


def factor_of(block: Block) -> str:
    """``A`` or ``B`` by the tensor's name; of a matrix that says neither by its shape: B is the taller one. ``vector``
    is what has one axis: DoRA's magnitudes, norms that are trained."""
    if block.is_vector:
        return VECTOR
    if ".lora_A" in block.tensor:
        return A
    return B if ".lora_B" in block.tensor or block.transposed else A


def layer_of(block: Block) -> int | None:
    """The first number in the tensor's name, as in ``model.layers.3.self_attn``; None: there is none."""
    found = _LAYER.search(block.tensor)
    return None if found is None else int(found[1])
