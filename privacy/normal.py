"""Normal numbers for noise that is to protect somebody. Knows streams and arrays; no norm, budget or tensor.

Two things set them apart from ``torch.randn``. Their bits come from ChaCha20 (``privacy.stream``), which cannot be
foretold from what was seen of it. And each is half the sum of four independent normals: a single Box-Muller sample
takes few of the doubles around it, so that what was released tells which values it can be noise on, and which it
cannot; the sum of four takes too many combinations of uniforms to be searched (Holohan and Braghin, "Secure Random
Sampling in Differential Privacy", ESORICS 2021).

What stays: the sum of a float and a float noise is rounded to a grid that depends on the value (Mironov, "On
Significance of the Least Significant Bits for Differential Privacy", CCS 2012). Coding a message after the noise, as
this project does, releases few bits of it; where the guarantee must hold to the letter, noise is added to integers
(``privacy.discrete``).

Accuracy: uniforms of 53 bits. A single sample reaches 8.57 standard deviations and no farther (a normal does with a
probability of 1e-17), the sum of four 17.1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from privacy.stream import Stream

_AVERAGED = 4
_AT_ONCE = 1 << 15  # samples whose temporaries fit a processor's cache


def normals(shape: int | tuple[int, ...], stream: Stream) -> NDArray[np.float64]:
    """Independent standard normal numbers, float64, of the given shape."""
    count = math.prod((shape,) if isinstance(shape, int) else shape)
    found = np.empty(count, dtype=np.float64)
    for start in range(0, count, _AT_ONCE):
        part = found[start : start + _AT_ONCE]
        part[:] = _box_muller(_AVERAGED * len(part), stream).reshape(_AVERAGED, -1).sum(axis=0)
    found *= 1 / math.sqrt(_AVERAGED)
    return found.reshape(shape)


def _box_muller(count: int, stream: Stream) -> NDArray[np.float64]:
    """``count`` normals, an even number, from as many uniforms (Box and Muller 1958)."""
    radius, angle = stream.uniforms(count).reshape(2, -1)
    radius = np.sqrt(-2.0 * np.log(radius))
    angle = 2.0 * math.pi * angle
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
