"""What the learned codec learned, and its tensors in an artifact, every one of them checked.

Shape suffixes: M magnitudes, W width of one block, K leading directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gradcodec.entropy import TOTAL, Table
from gradcodec.errors import ArtifactError
from gradcodec.learned.quantizer import CLASSES, ClassCoder, largest_magnitude
from gradcodec.learned.spectrum import Expected

_ROWS, _COLUMNS, _LEADING = "rows.", "columns.", "leading."
_ANY_COLUMNS = ("any_columns.a", "any_columns.b")
_COUNTS, _CENTROIDS = "frequencies.", "centroids."


@dataclass(frozen=True)
class LearnedTables:
    """All that the codec learned.

    Per class its coder; per tensor its expected levels and its leading directions along the width ``[W, K]`` float16;
    ``any_rows`` are the levels of rows by rank for tensors that were not seen; ``any_columns`` those of the leading
    directions of A and of B, and of all columns that follow, where both ends derive the directions (``basis.py``).
    """

    coders: Mapping[int, ClassCoder]
    any_rows: tuple[int, ...]
    expected: Mapping[str, Expected] = field(default_factory=dict)
    leading: Mapping[str, Tensor] = field(default_factory=dict)
    any_columns: tuple[tuple[int, ...], ...] = ((0,), (0,))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LearnedTables:
        """Raises ArtifactError: a tensor is missing or of another shape."""
        coders = {}
        for symbol_class in CLASSES:
            largest = largest_magnitude(symbol_class)
            table = _table(tensors, f"{_COUNTS}{symbol_class}", 2 * largest + 1)
            centroids_M = _checked(tensors, f"{_CENTROIDS}{symbol_class}", 1, torch.float32)
            if len(centroids_M) != largest + 1:
                raise ArtifactError(f"artifact tensor '{_CENTROIDS}{symbol_class}' has {len(centroids_M)} values")
            coders[symbol_class] = ClassCoder(table, centroids_M)
        any_rows = _small_integers(tensors, "any_rows")
        names = [key.removeprefix(_ROWS) for key in tensors if key.startswith(_ROWS)]
        expected = {
            name: Expected(_small_integers(tensors, _ROWS + name), _small_integers(tensors, _COLUMNS + name))
            for name in names
        }
        leading = {
            name: _checked(tensors, _LEADING + name, 2, torch.float16) for name in names if _LEADING + name in tensors
        }
        for name, basis_WK in leading.items():
            if basis_WK.shape[1] > basis_WK.shape[0] // 2:
                raise ArtifactError(f"artifact tensor {_LEADING + name!r} of shape {tuple(basis_WK.shape)} is no basis")
        any_columns = tuple(_small_integers(tensors, key) if key in tensors else (0,) for key in _ANY_COLUMNS)
        return cls(coders, any_rows, expected, leading, any_columns)

    @property
    def serve_derived(self) -> bool:
        """Whether there are levels of derived directions."""
        return self.any_columns != ((0,), (0,))

    def for_directions(self, leading: Mapping[str, Tensor], is_b: Mapping[str, bool]) -> LearnedTables:
        """The same for tensors whose directions are derived.

        Args:
            leading: tensor name -> its leading directions ``[W, K]``.
            is_b: tensor name -> whether it is a B factor.
        """
        expected = {}
        for name, basis_WK in leading.items():
            *strong, tail = self.any_columns[is_b[name]]
            expected[name] = Expected((), (*strong[: basis_WK.shape[1]], tail))
        return LearnedTables(self.coders, self.any_rows, expected, leading, self.any_columns)

    def to_tensors(self) -> dict[str, Tensor]:
        """Inverse of ``from_tensors``."""
        tensors = {"any_rows": torch.tensor(self.any_rows, dtype=torch.int8)}
        for key, columns in zip(_ANY_COLUMNS, self.any_columns, strict=True):
            if columns != (0,):
                tensors[key] = torch.tensor(columns, dtype=torch.int8)
        for symbol_class, coder in self.coders.items():
            tensors[f"{_COUNTS}{symbol_class}"] = torch.from_numpy(coder.table.astype(np.int32))
            tensors[f"{_CENTROIDS}{symbol_class}"] = coder.centroids_M
        for name, expected in self.expected.items():
            tensors[_ROWS + name] = torch.tensor(expected.rows, dtype=torch.int8)
            tensors[_COLUMNS + name] = torch.tensor(expected.columns, dtype=torch.int8)
        return tensors | {_LEADING + name: basis_WK.half() for name, basis_WK in self.leading.items()}


def _checked(tensors: Mapping[str, Tensor], key: str, num_dimensions: int, *dtypes: torch.dtype) -> Tensor:
    if key not in tensors:
        raise ArtifactError(f"the artifact lacks tensor {key!r}: it was made by another version")
    if tensors[key].ndim != num_dimensions or 0 in tensors[key].shape:
        raise ArtifactError(f"artifact tensor {key!r} has shape {tuple(tensors[key].shape)}")
    if tensors[key].dtype not in dtypes:
        raise ArtifactError(f"artifact tensor {key!r} has type {tensors[key].dtype}: {dtypes[0]} is expected")
    if not bool(torch.isfinite(tensors[key]).all()):
        raise ArtifactError(f"artifact tensor {key!r} holds NaN or infinity")
    return tensors[key]


def _small_integers(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    return tuple(_checked(tensors, key, 1, torch.int8).tolist())


def _table(tensors: Mapping[str, Tensor], key: str, size: int) -> Table:
    frequencies = _checked(tensors, key, 1, torch.int32, torch.int64).numpy()
    in_range = len(frequencies) == size and frequencies.min() >= 1 and frequencies.max() <= TOTAL
    if not in_range or frequencies.sum(dtype=np.int64) != TOTAL:
        raise ArtifactError(f"artifact tensor {key!r} is no frequency table of {size} symbols")
    return frequencies.astype(np.uint16)
