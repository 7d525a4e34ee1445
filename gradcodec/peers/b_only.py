"""``b-only``: the B factors alone, with all of the bytes; A decodes to zero.

FFA-LoRA (Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning") freezes A at its initial values
and trains B: clients have to do the same, or what they change in A stays in their residual, never sent. B is coded as
in ``rotated.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.codec import codec_id
from gradcodec.errors import CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.peers.packing import budget_of
from gradcodec.peers.rotated import RotatedCodec

_B = ".lora_B."


class BOnlyCodec:
    """``b-only``: any rate; half of the parameters, or about that, get it all."""

    num_streams = 1
    id = codec_id("b-only/1")

    def __init__(self, layout: Layout) -> None:
        """Raises CodecError: the layout has no B factors."""
        self.layout = layout
        shapes = {block.name: block.shape for block in layout.blocks if _B in block.name}
        if not shapes:
            raise CodecError(f"codec b-only needs tensors named '...{_B}...': this adapter has none")
        self._inner = RotatedCodec(Layout.of(shapes))

    def side_information(self, global_update_RC: Tensor) -> Tensor | None:
        """Principal axes of the last global update's B factors, ``[B, R, R]`` float32."""
        return self._inner.side_information(self._of_b(global_update_RC))

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        max_bytes = budget_of(max_bytes, self.layout.num_parameters)
        return self._inner.encode(self._of_b(blocks_RC), max_bytes, side)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        inner_RC = self._inner.decode(codes, side)
        blocks_RC = torch.zeros(self.layout.rank, self.layout.num_columns)
        for inner, outer in self._pairs():
            blocks_RC[: len(inner_RC), outer] = inner_RC[:, inner]
        return blocks_RC

    def _of_b(self, blocks_RC: Tensor) -> Tensor:
        rank = self._inner.layout.rank
        return torch.cat([blocks_RC[:rank, outer] for _, outer in self._pairs()], dim=1)

    def _pairs(self) -> list[tuple[slice, slice]]:
        """Columns of every B factor, in its own layout and in the whole."""
        whole = {block.name: slice(block.start, block.stop) for block in self.layout.blocks}
        return [(slice(block.start, block.stop), whole[block.name]) for block in self._inner.layout.blocks]
