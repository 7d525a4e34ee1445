"""Layout: the frozen bijection between an adapter's tensors and blocks.

A *block* is one LoRA factor seen with its rank first: A is ``[rank, width_in]`` already, B is transposed to
``[rank, width_out]``. All blocks lie side by side in one matrix. Knows names and shapes; must not know values,
models or codecs.

Shape suffixes: R rank (rows), C columns (the widths of all blocks added up), W width of one block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.errors import CodecError


@dataclass(frozen=True)
class Block:
    """Where one tensor lies: columns ``start:stop`` and the first ``rank`` rows of the blocks matrix."""

    name: str
    shape: tuple[int, int]
    transposed: bool
    start: int

    @property
    def rank(self) -> int:
        return self.shape[1] if self.transposed else self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[0] if self.transposed else self.shape[1]

    @property
    def stop(self) -> int:
        return self.start + self.width

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Layout:
    """Frozen bijection between an adapter's tensors and the blocks matrix ``[R, C]``.

    A factor of a lower rank than the highest occupies the first rows of its columns; the rest stays zero.
    """

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """The layout of an adapter, its tensors ordered by name.

        Args:
            shapes: PEFT tensor name -> shape. Every tensor is a matrix; the shorter side is taken as the rank (for
                a square one, the name decides: ``lora_B`` is transposed).

        Raises:
            CodecError: no tensors, or one that is not a non-empty matrix.
        """
        if not shapes:
            raise CodecError("the adapter has no tensors: nothing to encode (check lora.target_modules)")
        blocks: list[Block] = []
        start = 0
        for name in sorted(shapes):
            shape = tuple(shapes[name])
            if len(shape) != 2 or 0 in shape:
                raise CodecError(f"tensor {name!r} has shape {shape}: LoRA factors are non-empty matrices")
            rows, columns = shape
            transposed = columns < rows or (columns == rows and ".lora_B." in name)
            block = Block(name, (rows, columns), transposed, start)
            blocks.append(block)
            start = block.stop
        return cls(tuple(blocks))

    @cached_property
    def id(self) -> bytes:
        """4 bytes: digest of names and shapes. Two ends with equal ids cut an update in the same way."""
        text = "".join(f"{block.name}:{block.shape[0]}x{block.shape[1]}\n" for block in self.blocks)
        return hashlib.sha256(text.encode()).digest()[:4]

    @property
    def rank(self) -> int:
        return max(block.rank for block in self.blocks)

    @property
    def num_columns(self) -> int:
        return self.blocks[-1].stop

    @property
    def num_parameters(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {block.name: block.shape for block in self.blocks}

    def to_blocks(self, update: Mapping[str, Tensor]) -> Tensor:
        """Update -> blocks ``[R, C]`` float32, on the update's device.

        Raises:
            CodecError: a tensor is missing, unknown or of another shape.
        """
        self._check(update)
        device = next(iter(update.values())).device
        blocks_RC = torch.zeros(self.rank, self.num_columns, dtype=torch.float32, device=device)
        for block in self.blocks:
            tensor = update[block.name].detach()
            blocks_RC[: block.rank, block.start : block.stop] = tensor.T if block.transposed else tensor
        return blocks_RC

    def to_update(self, blocks_RC: Tensor) -> dict[str, Tensor]:
        """Blocks ``[R, C]`` -> update, float32; the inverse of ``to_blocks``.

        Raises:
            CodecError: the matrix has another shape.
        """
        if tuple(blocks_RC.shape) != (self.rank, self.num_columns):
            raise CodecError(
                f"blocks have shape {tuple(blocks_RC.shape)}, the layout wants {(self.rank, self.num_columns)}"
            )
        update: dict[str, Tensor] = {}
        for block in self.blocks:
            tensor = blocks_RC[: block.rank, block.start : block.stop]
            update[block.name] = (tensor.T if block.transposed else tensor).contiguous()
        return update

    def flatten(self, blocks_RC: Tensor) -> Tensor:
        """Blocks ``[R, C]`` -> the ``num_parameters`` values alone, block after block, without padding."""
        return torch.cat([blocks_RC[: b.rank, b.start : b.stop].reshape(-1) for b in self.blocks])

    def unflatten(self, values: Tensor) -> Tensor:
        """Values ``[num_parameters]`` -> blocks ``[R, C]``; the inverse of ``flatten``."""
        blocks_RC = values.new_zeros(self.rank, self.num_columns)
        for block, piece in zip(self.blocks, values.split([b.size for b in self.blocks]), strict=True):
            blocks_RC[: block.rank, block.start : block.stop] = piece.reshape(block.rank, block.width)
        return blocks_RC

    def _check(self, update: Mapping[str, Tensor]) -> None:
        names = {block.name for block in self.blocks}
        if missing := sorted(names - update.keys()):
            raise CodecError(f"the update lacks tensor {missing[0]!r} ({len(missing)} missing in all)")
        if unknown := sorted(update.keys() - names):
            raise CodecError(f"the update has unknown tensor {unknown[0]!r} ({len(unknown)} unknown in all)")
        for block in self.blocks:
            if tuple(update[block.name].shape) != block.shape:
                raise CodecError(
                    f"tensor {block.name!r} has shape {tuple(update[block.name].shape)}, expected {block.shape}"
                )
