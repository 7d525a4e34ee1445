"""Entropy model of the scalar quantiser (``rotated.py``): which integers are how likely where, from integers alone.

A *level* is the magnitude of a quantised value. A *class* is a frequency table: class t gives level 0 the odds
``1.3 ** (t - 32)``; the last one is silence. A value's class is its row's, which is sent, plus two offsets by what its
column had in the rows before: its own column's, and the same column's in all blocks of that kind. Both ends count
those levels alike, so that the column's scale costs nothing.

Knows integers; must not know steps or values. Shape suffixes: R rank, B blocks, C columns, T classes, M levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gradcodec.entropy import (
    SymbolReader,
    Symbols,
    Table,
    bits_of,
    encode_symbols,
    gamma_parts,
    integer_table,
    read_gamma,
    uniform_table,
)
from gradcodec.errors import CodecError
from gradcodec.layout import Layout

NUM_CLASSES = 64
SILENT = NUM_CLASSES - 1
ESCAPE = 63
"""This level and higher ones are written as ESCAPE and the rest apart."""
MAX_LEVEL = ESCAPE + (1 << 15) - 2
_NUM_CONTEXTS = 9
_THRESHOLDS = np.array([32, 45, 64, 91, 181, 256, 362, 512])
"""Of a column's activity over its block's mean, in 1/128: half-octaves, a wider one about 1."""
_MAX_OFFSET = 20
_NUM_GROUPS = 16
_GROUP = NUM_CLASSES // _NUM_GROUPS
_MAX_SHIFT = 24
_SHAPES = 16
_START = 44
"""What the first row of the first block of a kind is measured from."""
_PLACES = np.arange(NUM_CLASSES)

Levels = NDArray[np.int32]
Classes = NDArray[np.uint8]
Contexts = NDArray[np.int64]
Doubles = NDArray[np.float64]


def _grid() -> Doubles:
    """Probabilities whose odds are ``1.3 ** -32`` to ``1.3 ** 31``, by multiplication alone: equal everywhere."""
    odds = np.ones(NUM_CLASSES)
    for index in range(33, NUM_CLASSES):
        odds[index] = odds[index - 1] * 1.3
    for index in range(31, -1, -1):
        odds[index] = odds[index + 1] / 1.3
    return odds / (1 + odds)


def _exact_table(probabilities: Doubles) -> Table:
    """A table for both ends to compute: of integers, whose sum does not depend on the order of adding."""
    return integer_table(np.rint(probabilities * (1 << 30)))


def _two_sided(radius: int, ratio: float) -> Table:
    """Table of the integers ``-radius..radius``: each step away from 0 is ``ratio`` times as likely."""
    powers = np.cumprod(np.concatenate([[1.0], np.full(radius, ratio)]))
    return _exact_table(np.concatenate([powers[:0:-1], powers]))


_PROBABILITIES = _grid()
_OFFSET_TABLE = _two_sided(_MAX_OFFSET, 0.7)
_SHIFT_TABLE = _two_sided(_MAX_SHIFT, 0.35)
_ROW_TABLES = [_two_sided(SILENT, (shape + 1) / (_SHAPES + 1)) for shape in range(_SHAPES)]
_AFTER_SILENCE = integer_table(np.array([1.0] * SILENT + [1500.0]))
_ESCAPE_LENGTHS = integer_table(np.cumprod(np.full(15, 0.5)))


def _default_tails() -> NDArray[np.int64]:
    """``[2, T]``: places on the grid of the odds that a level above 0 is 1, and that one above 1 is the last.

    Those of a Laplacian behind a dead zone, less steep where little is sent: what is left of heavy tails.
    """
    return np.stack([np.minimum(_PLACES + 3, 46), np.minimum(_PLACES + 2, 42)])


@dataclass(frozen=True)
class Model:
    """What a payload says of its levels.

    ``tails`` ``[2, groups]`` shift how classes fall off, for four classes together; ``offsets`` ``[2, contexts]`` say
    by how much contexts move a class; ``rows_RB`` are the rows' classes.
    """

    tails: NDArray[np.int64]
    offsets: NDArray[np.int64]
    rows_RB: Classes

    @cached_property
    def tables(self) -> list[Table]:
        """A table for each class: level 0, level 1, then geometric, all with probabilities of the grid."""
        tables = []
        tails = np.clip(_default_tails() + self.tails.repeat(_GROUP, axis=1), 0, NUM_CLASSES - 1)
        for index in range(NUM_CLASSES):
            one, stop = _PROBABILITIES[tails[:, index]]
            falling = np.cumprod(np.concatenate([[1 - one], np.full(ESCAPE - 2, 1 - stop)]))
            above = np.concatenate([[one], falling * stop])
            above[-1] += falling[-1] * (1 - stop)
            zero = _PROBABILITIES[index]
            tables.append(_exact_table(np.concatenate([[zero], (1 - zero) * above])))
        return tables

    @cached_property
    def bits_TM(self) -> NDArray[np.float32]:
        """What every level costs in every class; the sign and an escape's rest included."""
        bits = np.stack([bits_of(table) for table in self.tables])
        bits[:, 1:] += 1
        bits[SILENT] = [0.0] + [1e6] * ESCAPE
        return bits.astype(np.float32)


class Columns:
    """Which column of the blocks matrix belongs to which block, and which columns are of one kind."""

    def __init__(self, layout: Layout, num_rows: int) -> None:
        self.num_rows = num_rows
        self.starts = np.array([block.start for block in layout.blocks])
        self.widths = np.array([block.width for block in layout.blocks])
        self.owner_C = np.repeat(np.arange(len(self.widths)), self.widths)
        kinds: dict[tuple[bool, int], int] = {}
        kind_B = [kinds.setdefault((b.transposed, b.width), len(kinds)) for b in layout.blocks]
        self.before_B = [max((i for i in range(b) if kind_B[i] == kind_B[b]), default=None) for b in range(len(kind_B))]
        pool_starts = np.cumsum([0] + [width for _, width in kinds])[:-1]
        within = np.arange(layout.num_columns) - np.repeat(self.starts, self.widths)
        self.pool_C = np.repeat(pool_starts[kind_B], self.widths) + within
        self._pool_widths = np.array([width for _, width in kinds])
        self._pool_starts = pool_starts
        self._pool_owner = np.repeat(np.arange(len(kinds)), self._pool_widths)

    def contexts(self, activity_C: Levels) -> tuple[Contexts, Contexts]:
        """Sum of a column's levels so far -> its two contexts, each ``[C]`` in 0..8."""
        sums_B = np.add.reduceat(activity_C, self.starts, dtype=np.int64)
        own = _context(activity_C.astype(np.int64), self.widths[self.owner_C], sums_B[self.owner_C])
        pooled = np.bincount(self.pool_C, weights=activity_C).astype(np.int64)
        sums = np.add.reduceat(pooled, self._pool_starts)
        shared = _context(pooled, self._pool_widths[self._pool_owner], sums[self._pool_owner])
        return own, shared[self.pool_C]


def _context(activity: Contexts, widths: Contexts, sums: Contexts) -> Contexts:
    """Activity over the mean, half a count added to both: the estimate of a scale from few counts."""
    ratio = (2 * activity + 1) * widths * 128 // (2 * sums + widths)
    return np.searchsorted(_THRESHOLDS, ratio, side="right").astype(np.int64)


def classes_of(model: Model, columns: Columns, rank: int, activity_C: Levels) -> Classes:
    """Class of every value of one row of all blocks, ``[C]``; both ends compute it from the rows before."""
    row_C: Classes = model.rows_RB[rank][columns.owner_C]
    if rank == 0 or not model.offsets.any():
        return row_C
    moved = row_C.astype(np.int64)
    for offsets, contexts in zip(model.offsets, columns.contexts(activity_C), strict=True):
        moved = np.clip(moved + offsets[contexts], 0, SILENT - 1)
    return np.where(row_C == SILENT, row_C, moved.astype(np.uint8))


def fit(levels_RC: Levels, columns: Columns, start: Model | None = None) -> tuple[Model, Classes, float, float]:
    """The model that makes these levels cheap, their classes ``[R, C]``, and bits of model and levels.

    ``start`` is one of nearly the same levels, by whose tails the rows are judged.
    """
    capped_RC = np.minimum(levels_RC, ESCAPE)
    model = start or Model(np.zeros((2, _NUM_GROUPS), np.int64), np.empty(0, np.int64), np.empty((0, 0), np.uint8))
    rows_RB = _fit_rows(capped_RC, columns, model)
    row_RC = rows_RB[:, columns.owner_C].astype(np.int64)
    activity_RC = np.cumsum(capped_RC, axis=0, dtype=np.int32) - capped_RC
    found = [columns.contexts(activity_C) for activity_C in activity_RC]
    contexts = [np.stack([pair[i] for pair in found]) for i in range(2)]
    offsets = np.zeros((2, _NUM_CONTEXTS), np.int64)
    live = row_RC != SILENT
    live[0] = False
    classes = row_RC[live]
    levels = capped_RC[live]
    for side in range(2):
        kept = contexts[side][live]
        offsets[side] = _fit_offsets(classes, kept, levels, model.bits_TM)
        classes = np.clip(classes + offsets[side][kept], 0, SILENT - 1)
    row_RC[live] = classes
    classes_RC = row_RC.astype(np.uint8)
    counts_TM = _counts(classes_RC, capped_RC, NUM_CLASSES)
    tails = _fit_tails(counts_TM)
    model = Model(tails, offsets, rows_RB)
    escapes = levels_RC[levels_RC >= ESCAPE] - ESCAPE + 1
    bits = float((counts_TM * model.bits_TM)[:SILENT].sum()) + float((2 * np.log2(escapes) + 1).sum())
    head = sum((float(bits_of(table)[symbols].sum()) for symbols, table in _model_parts(model, columns)[1]), 0.0)
    return model, classes_RC, head, bits


def _counts(classes: NDArray[np.generic], levels: Levels, num_classes: int) -> Doubles:
    """How often each level occurs in each class, ``[classes, M]``."""
    joint = classes.astype(np.int32).reshape(-1) * (ESCAPE + 1) + levels.reshape(-1)
    return np.bincount(joint, minlength=num_classes * (ESCAPE + 1)).reshape(-1, ESCAPE + 1).astype(np.float64)


def _fit_rows(capped_RC: Levels, columns: Columns, model: Model) -> Classes:
    """Per row its class, ``[R, B]``: the path through a block's rows that is cheapest with its steps' prices
    (Viterbi), found once with sharply falling prices and again with those of the steps found."""
    num_blocks = len(columns.starts)
    bits_MT = model.bits_TM.T.astype(np.float64)
    costs_RBT = np.stack([_counts(columns.owner_C, levels_C, num_blocks) @ bits_MT for levels_C in capped_RC])
    before = np.array([-1 if b is None else b for b in columns.before_B])
    rows_RB = np.empty(costs_RBT.shape[:2], np.uint8)
    shape, shape_first, first_B = _SHAPES // 2, _SHAPES // 2, np.argmin(costs_RBT[0], axis=1)
    for _ in range(2):
        from_B = np.where(before < 0, _START, first_B[before])
        total_BT = costs_RBT[0] + bits_of(_ROW_TABLES[shape_first])[_PLACES - from_B[:, None] + SILENT]
        prices_TT = bits_of(_ROW_TABLES[shape])[_PLACES - _PLACES[:, None] + SILENT]
        prices_TT[SILENT] = bits_of(_AFTER_SILENCE)
        pasts = []
        for costs_BT in costs_RBT[1:]:
            through_BTT = total_BT[:, :, None] + prices_TT
            pasts.append(np.argmin(through_BTT, axis=1))
            total_BT = through_BTT.min(axis=1) + costs_BT
        found_B = np.argmin(total_BT, axis=1)
        for rank in range(len(rows_RB) - 1, -1, -1):
            rows_RB[rank] = found_B
            found_B = pasts[rank - 1][np.arange(num_blocks), found_B] if rank else found_B
        first_B = found_B
        shape, shape_first = _row_shapes(rows_RB, columns)
    return rows_RB


def _fit_offsets(
    classes: NDArray[np.int64], contexts: NDArray[np.int64], levels: Levels, bits_TM: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Per context by how much its values' classes move, the price of saying so included."""
    counts = _counts(contexts * NUM_CLASSES + classes, levels, _NUM_CONTEXTS * NUM_CLASSES)
    counts_KTM = counts.reshape(_NUM_CONTEXTS, NUM_CLASSES, -1)
    steps = np.arange(-_MAX_OFFSET, _MAX_OFFSET + 1)
    moved_ST = np.clip(_PLACES + steps[:, None], 0, SILENT - 1)
    costs_KTT = np.einsum("ktm,um->ktu", counts_KTM, bits_TM.astype(np.float64), optimize=True)
    costs_KS = np.stack([costs_KTT[:, _PLACES, moved].sum(axis=1) for moved in moved_ST], axis=1)
    return np.asarray(steps[np.argmin(costs_KS + bits_of(_OFFSET_TABLE), axis=1)])


def _fit_tails(counts_TM: Doubles) -> NDArray[np.int64]:
    """Per group of classes the two shifts that suit its levels best, the price of saying so included."""
    ones, above = counts_TM[:, 1], counts_TM[:, 2:].sum(axis=1)
    steps = (counts_TM[:, 2:] * np.arange(ESCAPE - 1)).sum(axis=1)
    shifts = np.arange(-_MAX_SHIFT, _MAX_SHIFT + 1)
    tails = np.empty((2, _NUM_GROUPS), np.int64)
    for which, (hits, misses) in enumerate([(ones, above), (above, steps)]):
        odds = _PROBABILITIES[np.clip(_default_tails()[which, :, None] + shifts, 0, NUM_CLASSES - 1)]
        costs_TS = -hits[:, None] * np.log2(odds) - misses[:, None] * np.log2(1 - odds)
        costs_GS = np.add.reduceat(costs_TS, np.arange(0, NUM_CLASSES, _GROUP), axis=0)
        tails[which] = shifts[np.argmin(costs_GS + bits_of(_SHIFT_TABLE), axis=1)]
    return tails


def pack_levels(signed_RC: Levels, model: Model, classes_RC: Classes, columns: Columns) -> bytes:
    """Signed levels ``[R, C]`` -> bytes: the model, then levels row by row and class by class, escapes, signs."""
    levels_RC = np.abs(signed_RC)
    capped_RC = np.minimum(levels_RC, ESCAPE)
    head, parts = _model_parts(model, columns)
    for levels_C, classes_C in zip(capped_RC, classes_RC, strict=True):
        order, bounds = _by_class(classes_C)
        ordered = levels_C[order]
        parts += [(ordered[a:b], model.tables[t]) for t, a, b in bounds]
    parts += gamma_parts((levels_RC[levels_RC >= ESCAPE] - ESCAPE + 1).astype(np.int32), _ESCAPE_LENGTHS)
    parts.append(((signed_RC[levels_RC > 0] < 0).astype(np.int32), uniform_table(1)))
    return head + encode_symbols(parts)


def unpack_levels(data: bytes, columns: Columns) -> tuple[Levels, Classes]:
    """Inverse of ``pack_levels``: signed levels and classes, ``[R, C]``; raises CodecError and nothing else."""
    reader, model = _read_model(data, columns)
    shape = (columns.num_rows, len(columns.owner_C))
    levels_RC, classes_RC = np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
    activity_C = np.zeros(shape[1], np.int32)
    for rank in range(columns.num_rows):
        classes_RC[rank] = classes_of(model, columns, rank, activity_C)
        order, bounds = _by_class(classes_RC[rank])
        for t, a, b in bounds:
            levels_RC[rank, order[a:b]] = reader.read(b - a, model.tables[t])
        activity_C += levels_RC[rank]
    places = np.nonzero(levels_RC == ESCAPE)
    levels_RC[places] += read_gamma(reader, len(places[0]), _ESCAPE_LENGTHS) - 1
    nonzero = np.nonzero(levels_RC)
    levels_RC[nonzero] *= 1 - 2 * reader.read(len(nonzero[0]), uniform_table(1))
    return levels_RC, classes_RC


def _by_class(classes_C: Classes) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
    """Columns ordered by class, and each class with its stretch of them; silent ones left out."""
    order = np.argsort(classes_C, kind="stable")
    ends = np.cumsum(np.bincount(classes_C, minlength=NUM_CLASSES)).tolist()
    bounds = [(t, a, b) for t, (a, b) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if a < b]
    return order, [bound for bound in bounds if bound[0] != SILENT]


def _model_parts(model: Model, columns: Columns) -> tuple[bytes, list[tuple[Symbols, Table]]]:
    shifts = (model.tails + _MAX_SHIFT).astype(np.int32).reshape(-1)
    offsets = (model.offsets + _MAX_OFFSET).astype(np.int32).reshape(-1)
    parts = [(shifts, _SHIFT_TABLE), (offsets, _OFFSET_TABLE)]
    rows_RB = model.rows_RB.astype(np.int32)
    shape, shape_first = _row_shapes(model.rows_RB, columns)
    first = _first_steps(model.rows_RB, columns)
    parts += [(first + SILENT, _ROW_TABLES[shape_first])]
    for rank in range(1, columns.num_rows):
        live = rows_RB[rank - 1] != SILENT
        parts.append((rows_RB[rank, live] - rows_RB[rank - 1, live] + SILENT, _ROW_TABLES[shape]))
        parts.append((rows_RB[rank, ~live], _AFTER_SILENCE))
    return bytes([shape * _SHAPES + shape_first]), parts


def _first_steps(rows_RB: Classes, columns: Columns) -> Symbols:
    """Per block how far its first row's class is from that of the block before of its kind."""
    before = np.array([_START if b is None else rows_RB[0, b] for b in columns.before_B], np.int32)
    steps: Symbols = rows_RB[0].astype(np.int32) - before
    return steps


def _row_shapes(rows_RB: Classes, columns: Columns) -> tuple[int, int]:
    """The cheapest tables for the steps from row to row, and from block to block."""
    after, before = rows_RB[1:].astype(np.int32), rows_RB[:-1].astype(np.int32)
    steps = (after - before)[before != SILENT] + SILENT
    first = _first_steps(rows_RB, columns) + SILENT
    costs = [[float(bits_of(table)[found].sum()) for table in _ROW_TABLES] for found in (steps, first)]
    return int(np.argmin(costs[0])), int(np.argmin(costs[1]))


def _read_model(data: bytes, columns: Columns) -> tuple[SymbolReader, Model]:
    """Inverse of ``_model_parts``."""
    if not data:
        raise CodecError("the codes end before the levels")
    shape, shape_first = divmod(data[0], _SHAPES)
    reader = SymbolReader(data[1:])
    tails = reader.read(2 * _NUM_GROUPS, _SHIFT_TABLE).reshape(2, -1).astype(np.int64) - _MAX_SHIFT
    offsets = reader.read(2 * _NUM_CONTEXTS, _OFFSET_TABLE).reshape(2, -1).astype(np.int64) - _MAX_OFFSET
    rows_RB = np.zeros((columns.num_rows, len(columns.starts)), np.int64)
    for block, step in enumerate(reader.read(len(columns.starts), _ROW_TABLES[shape_first]) - SILENT):
        before = columns.before_B[block]
        rows_RB[0, block] = step + (_START if before is None else rows_RB[0, before])
    for rank in range(1, columns.num_rows):
        live = rows_RB[rank - 1] != SILENT
        steps = reader.read(int(live.sum()), _ROW_TABLES[shape]) - SILENT
        rows_RB[rank, live] = rows_RB[rank - 1, live] + steps
        rows_RB[rank, ~live] = reader.read(int((~live).sum()), _AFTER_SILENCE)
    if rows_RB.min() < 0 or rows_RB.max() > SILENT:
        raise CodecError("a row's class is out of range")
    return reader, Model(tails, offsets, rows_RB.astype(np.uint8))
