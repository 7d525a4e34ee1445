"""Layout: the frozen bijection between an adapter's tensors and blocks.

A *block* is one LoRA factor seen with its rank first: A is ``[rank, width_in]`` already, B is transposed to
``[rank, width_out]``. Where a model has several projections in one tensor (q, k and v, say), whose statistics differ,
each of them is a block. A vector (DoRA's magnitudes, norms) is a block of rank 1. All blocks lie side by side in one
matrix. Knows names and shapes; must not know values, models or codecs.

Shape suffixes: R rank (rows), C columns (the widths of all blocks added up), W width of one block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gradcodec.errors import CodecError

Rows = tuple[range, ...]
"""Rows of a tensor that make up one part of it, in this order."""


@dataclass(frozen=True)
class Block:
    """Where a tensor or a part of it lies: columns ``start:stop`` and the first ``rank`` rows of the blocks matrix.

    ``name`` is the tensor's, or ``<tensor>#<part>``; ``shape`` that of the part.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    start: int
    tensor: str
    rows: Rows | None = None  # of the tensor; None: all
    is_vector: bool = False  # the tensor has one axis, and is its block's only row

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

    @property
    def row_index(self) -> Tensor | slice:
        """What picks the block's rows out of its tensor."""
        if self.rows is None:
            return slice(None)
        return torch.cat([torch.arange(run.start, run.stop, run.step) for run in self.rows])


@dataclass(frozen=True)
class Layout:
    """Frozen bijection between an adapter's tensors and the blocks matrix ``[R, C]``.

    A factor of a lower rank than the highest occupies the first rows of its columns; the rest stays zero.
    """

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Mapping[str, Rows]] | None = None) -> Layout:
        """The layout of an adapter, its blocks ordered by name.

        Args:
            shapes: PEFT tensor name -> shape. Of a matrix the shorter side is taken as the rank (for a square one,
                the name decides: ``lora_B`` is transposed); a vector has rank 1.
            parts: tensor name -> part name -> rows, for transposed tensors of which each part is a block. One with a
                part of fewer rows than the rank stays whole.

        Raises:
            CodecError: no tensors, one that is neither a matrix nor a vector, or is empty, or parts that do not share
                out all rows of theirs.
        """
        if not shapes:
            raise CodecError("the adapter has no tensors: nothing to encode")
        unplaced = [
            block for name in shapes for block in _blocks_of(name, tuple(shapes[name]), (parts or {}).get(name))
        ]
        blocks: list[Block] = []
        start = 0
        for block in sorted(unplaced, key=lambda block: block.name):
            blocks.append(replace(block, start=start))
            start = blocks[-1].stop
        return cls(tuple(blocks))

    @cached_property
    def id(self) -> bytes:
        """4 bytes: digest of names, shapes and parts. Two ends with equal ids cut an update in the same way."""
        text = "".join(f"{b.name}:{_size_of(b)}{_text_of(b.rows)}\n" for b in self.blocks)
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

    def num_parameters_of(self, rank: int) -> int:
        """Of the first ``rank`` rows of every block."""
        return sum(min(block.rank, rank) * block.width for block in self.blocks)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors."""
        rows = dict.fromkeys((block.tensor for block in self.blocks), 0)
        for block in self.blocks:
            rows[block.tensor] += block.shape[0]
        return {
            block.tensor: block.shape[1:] if block.is_vector else (rows[block.tensor], block.shape[1])
            for block in self.blocks
        }

    @cached_property
    def _of_tensor(self) -> dict[str, list[Block]]:
        found: dict[str, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.tensor, []).append(block)
        return found

    @property
    def parts(self) -> dict[str, dict[str, Rows]]:
        """Of the tensors that are several blocks; with ``shapes``, what ``Layout.of`` makes this layout from."""
        found: dict[str, dict[str, Rows]] = {}
        for block in self.blocks:
            if block.rows is not None:
                found.setdefault(block.tensor, {})[block.name.rpartition("#")[2]] = block.rows
        return found

    def to_blocks(self, update: Mapping[str, Tensor]) -> Tensor:
        """Update -> blocks ``[R, C]`` float32, on the update's device.

        Raises:
            CodecError: a tensor is missing, unknown or of another shape.
        """
        self._check(update)
        device = next(iter(update.values())).device
        blocks_RC = torch.zeros(self.rank, self.num_columns, dtype=torch.float32, device=device)
        for block in self.blocks:
            tensor = update[block.tensor].detach()[block.row_index]
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
        return dict(self.tensors(blocks_RC))

    def tensors(self, blocks_RC: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What ``to_update`` gives, one tensor at a time: for who has no room for all of them beside the blocks."""
        for name, shape in self.shapes.items():
            made = blocks_RC.new_empty(shape)
            for block in self._of_tensor[name]:
                part = blocks_RC[: block.rank, block.start : block.stop]
                made[block.row_index] = part.T if block.transposed else part[0] if block.is_vector else part
            yield name, made

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
        shapes = self.shapes
        if missing := sorted(shapes.keys() - update.keys()):
            raise CodecError(f"the update lacks tensor {missing[0]!r} ({len(missing)} missing in all)")
        if unknown := sorted(update.keys() - shapes.keys()):
            raise CodecError(f"the update has unknown tensor {unknown[0]!r} ({len(unknown)} unknown in all)")
        for name, shape in shapes.items():
            if tuple(update[name].shape) != shape:
                raise CodecError(f"tensor {name!r} has shape {tuple(update[name].shape)}, expected {shape}")


def rank_first(name: str, tensor: Tensor) -> Tensor:
    """A view of an adapter's tensor with its rank first, ``[rank, width]``, as its blocks have it."""
    block = next(_blocks_of(name, tuple(tensor.shape), None))
    return tensor[None] if block.is_vector else tensor.T if block.transposed else tensor


def _blocks_of(name: str, shape: tuple[int, ...], parts: Mapping[str, Rows] | None) -> Iterator[Block]:
    """A tensor's blocks, all at column 0."""
    if len(shape) == 1 and shape[0] > 0:
        yield Block(name, (1, shape[0]), False, 0, name, is_vector=True)
        return
    if len(shape) != 2 or 0 in shape:
        raise CodecError(f"tensor {name!r} has shape {shape}: it is neither a matrix nor a vector, or is empty")
    rows, columns = shape
    transposed = columns < rows or (columns == rows and ".lora_B." in name)
    if parts is None or not transposed:
        yield Block(name, (rows, columns), transposed, 0, name)
        return
    ranges = [run for runs in parts.values() for run in runs]
    within = all(0 <= end < rows for run in ranges if run for end in (run[0], run[-1]))
    if within and any(sum(map(len, runs)) < columns for runs in parts.values()):
        yield Block(name, (rows, columns), transposed, 0, name)
        return
    # counted before they are listed: ranges from a file may be of any length
    if not within or sum(map(len, ranges)) != rows or len({row for run in ranges for row in run}) != rows:
        raise CodecError(f"tensor {name!r} has {rows} rows; its parts {', '.join(parts)} do not share them out")
    for part, runs in parts.items():
        yield Block(f"{name}#{part}", (sum(map(len, runs)), columns), transposed, 0, name, runs)


def _size_of(block: Block) -> str:
    return f"{block.width}" if block.is_vector else f"{block.shape[0]}x{block.shape[1]}"


def _text_of(rows: Rows | None) -> str:
    return "" if rows is None else " " + ",".join(f"{run.start}-{run.stop}-{run.step}" for run in rows)
