"""Provisional."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privacy.stream import Stream


def normals(shape: tuple[int, ...], stream: Stream) -> NDArray[np.float64]:
    count = math.prod(shape)
    radius = np.sqrt(-2 * np.log1p(-stream.uniforms(count)))
    found: NDArray[np.float64] = radius * np.cos(2 * np.pi * stream.uniforms(count))
    return found.reshape(shape)
