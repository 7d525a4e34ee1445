"""Bands: coefficients from the strongest expected to the weakest, and how many digits each band gets.

A band is mixed by a random rotation before it is rounded. Its coordinates are then Gaussian and of one energy, however
uneven its coefficients are, so that one announced level fits all of them and few saturate. A band of which only some
coordinates are sent is a random projection. All is decided by integers. Shape suffixes: B bands, K coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradcodec.announcement import Levels
from gradcodec.lattice import step_of
from gradcodec.learned.spectrum import LEVELS_PER_OCTAVE
from gradcodec.residues import Integers

_SMALLEST = 256
_GROWTH = 4
_MOST_SPAN = 2**16


@dataclass(frozen=True)
class Share:
    """What of a band is sent: coefficients ``start:stop`` of the order, and the digits of each of their first
    ``len(num_digits_K)`` coordinates."""

    band: int
    start: int
    stop: int
    num_digits_K: Integers

    @property
    def is_whole(self) -> bool:
        """Whether all of its coordinates are sent."""
        return len(self.num_digits_K) == self.stop - self.start


def edges_of(num_coefficients: int) -> list[int]:
    """Where bands begin and end: the first of 256, each next a quarter of all before it, at least."""
    edges = [0]
    while edges[-1] < num_coefficients:
        edges.append(min(edges[-1] + max(_SMALLEST, edges[-1] // _GROWTH), num_coefficients))
    return edges


def gains_of(levels: int, most_digits: int) -> list[int]:
    """By how many levels a digit's worth lies below its band's: what it takes from the error of a coordinate, over the
    coordinate's energy."""
    gains, before = [], 1.0
    for digits in range(1, most_digits + 1):
        if levels**digits > _MOST_SPAN:
            break
        after = step_of(levels**digits)[1]
        gains.append(round(LEVELS_PER_OCTAVE * math.log2(max(before - after, 2.0**-40))))
        before = after
    return gains


def allocate(bands_B: Levels, edges: Sequence[int], num_integers: int, gains: Sequence[int]) -> list[Share]:
    """Which coordinates get how many digits, so that all of them are ``num_integers``: always the next digit where it
    takes the most from the error.

    Args:
        bands_B: announced levels.
        edges: of the bands, ``edges_of``.
        gains: of digits, ``gains_of``, falling.
    """
    sizes = np.diff(edges)
    wanted = [
        (-(int(level) + gain), band, place) for band, level in enumerate(bands_B) for place, gain in enumerate(gains)
    ]
    digits = [np.zeros(size, np.int64) for size in sizes]
    left = num_integers
    for _, band, _ in sorted(wanted):
        count = min(left, int(sizes[band]))
        digits[band][:count] += 1
        left -= count
        if left == 0:
            break
    return [
        Share(band, edges[band], edges[band + 1], num_digits[num_digits > 0])
        for band, num_digits in enumerate(digits)
        if len(num_digits) and num_digits[0]
    ]
