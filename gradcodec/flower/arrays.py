"""An app's arrays <-> what is coded of them, and what travels as it is.

Coded are floats: LoRA factors and other thin matrices as they are; every other array (a convolution's kernel, a full
layer, a bias, a norm) with its values in a matrix of as many rows as the thin ones have at most. What is no float, one
number alone, and the running statistics of batch norms (a coded variance could come out negative) travel exactly. Knows
Flower's arrays and layouts; must not know messages.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from gradcodec.errors import CodecError
from gradcodec.layout import Layout

THIN_ROWS = 64
"""A matrix whose shorter side is at most this, and a fourth of the longer one, is taken for a low-rank factor."""
FEW_ROWS = 8
"""Of the matrices that other arrays are folded to, where there is no thin one."""
_FLOATS = ("float16", "float32", "float64")
_STATISTICS = ("running_mean", "running_var")
_HALF_MAX = float(np.finfo(np.float16).max)
_NUMPY = "numpy.ndarray"
_MOST_BYTES = 1 << 24
_MOST_VALUES = 1 << 40

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """One array: NumPy's name of its type, and its shape."""

    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class AppArrays:
    """The arrays of an app, in its own order: name -> type and shape."""

    specs: Mapping[str, Spec]

    @classmethod
    def of(cls, record: ArrayRecord) -> AppArrays:
        """Raises CodecError: there is nothing to code."""
        arrays = cls({name: Spec(array.dtype, tuple(array.shape)) for name, array in record.items()})
        if not arrays.matrices:
            raise CodecError("the app's arrays hold no floats: there is nothing to code")
        return arrays

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Of what is coded: name -> shape of the matrix that its values are put into."""
        coded = {name: spec for name, spec in self.specs.items() if _is_coded(name, spec)}
        thin = {name: spec.shape for name, spec in coded.items() if _is_thin(spec.shape)}
        rows = max((min(shape) for shape in thin.values()), default=FEW_ROWS)
        return {
            name: (spec.shape[0], spec.shape[1]) if name in thin else _folded(spec.size, rows)
            for name, spec in coded.items()
        }

    @cached_property
    def layout(self) -> Layout:
        """Of what is coded."""
        return Layout.of(self.matrices)

    def to_adapter(self, record: ArrayRecord) -> dict[str, Tensor]:
        """What is coded, as float32 matrices. Raises CodecError: the record has other arrays."""
        if record.keys() != self.specs.keys():
            odd = sorted(record.keys() ^ self.specs.keys())
            raise CodecError(f"the arrays are not those that the server sent: {odd[0]!r} ({len(odd)} in all)")
        adapter = {}
        for name, matrix in self.matrices.items():
            if tuple(record[name].shape) != self.specs[name].shape:
                raise CodecError(f"array {name!r} has shape {record[name].shape}, not {self.specs[name].shape}")
            adapter[name] = torch.from_numpy(np.array(record[name].numpy(), np.float32)).reshape(matrix)
        return adapter

    def exact_of(self, record: ArrayRecord) -> ArrayRecord:
        """What travels as it is."""
        return ArrayRecord({name: record[name] for name in self.specs if name not in self.matrices})

    def to_record(self, adapter: Mapping[str, Tensor], exact: ArrayRecord) -> ArrayRecord:
        """Inverse of ``to_adapter`` and ``exact_of``, in the app's order and types. Raises CodecError: one is missing,
        or of another shape."""
        arrays = {}
        for name, spec in self.specs.items():
            if name in self.matrices:
                values = adapter[name].reshape(spec.shape).cpu().numpy()
                if spec.dtype == "float16":  # what is coded may come out beyond it
                    values = values.clip(-_HALF_MAX, _HALF_MAX)
                arrays[name] = Array(np.ascontiguousarray(values.astype(spec.dtype)))
            elif name in exact:
                _check_exact(name, exact[name], spec.shape)
                arrays[name] = exact[name]  # of any type: a mean of whole numbers is none
            else:
                raise CodecError(f"array {name!r} is missing")
        return ArrayRecord(arrays)

    def told(self) -> str:
        """In words, what becomes of the arrays."""
        thin = sum(_is_thin(self.specs[name].shape) for name in self.matrices)
        return (
            f"{self.layout.num_parameters:,} values of {len(self.matrices)} arrays, {thin} of them low-rank factors; "
            f"{len(self.specs) - len(self.matrices)} arrays travel as they are"
        )

    def pack(self) -> bytes:
        """Names, types and shapes, for the other end."""
        listed = [[name, spec.dtype, *spec.shape] for name, spec in self.specs.items()]
        return zlib.compress(json.dumps(listed).encode(), 9)

    @classmethod
    def unpack(cls, data: bytes) -> AppArrays:
        """Inverse of ``pack``. Raises CodecError: it is none."""
        unpacker = zlib.decompressobj()
        try:
            text = unpacker.decompress(data, _MOST_BYTES)
            listed = json.loads(text)
            specs = {str(name): Spec(str(dtype), tuple(map(int, shape))) for name, dtype, *shape in listed}
        except (zlib.error, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise CodecError(f"a list of arrays that cannot be read: {error!r}") from None
        if any(min(spec.shape, default=1) < 0 for spec in specs.values()):
            raise CodecError("a list of arrays with a negative shape")
        if sum(spec.size for spec in specs.values()) > _MOST_VALUES:
            raise CodecError("a list of arrays of more values than there can be")
        return cls(specs)


def _check_exact(name: str, array: Array, shape: Shape) -> None:
    """By its head, before anything is read. Raises CodecError: it is no plain array of numbers of this shape."""
    file = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        found, _, dtype = read(file)
    except Exception as error:  # NumPy parses what anybody may have written, and says so in many ways
        raise CodecError(f"array {name!r} cannot be read: {error!r}") from None
    size = dtype.itemsize * math.prod(shape)
    if array.stype != _NUMPY or found != shape or dtype.kind not in "biuf" or len(array.data) - file.tell() != size:
        raise CodecError(f"array {name!r} is no array of numbers of shape {shape}")


def _is_coded(name: str, spec: Spec) -> bool:
    return spec.dtype in _FLOATS and spec.size > 1 and name.rpartition(".")[2] not in _STATISTICS


def _is_thin(shape: Shape) -> bool:
    return len(shape) == 2 and min(shape) <= THIN_ROWS and 4 * min(shape) <= max(shape)


def _folded(size: int, most_rows: int) -> tuple[int, int]:
    """The matrix of ``size`` values with the most rows, of ``most_rows`` at most, that is wider than high."""
    rows = next(rows for rows in range(min(most_rows, size), 0, -1) if size % rows == 0 and rows <= size // rows)
    return rows, size // rows
