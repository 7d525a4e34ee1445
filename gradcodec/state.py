"""What a strategy remembers from round to round, as it goes into a checkpoint and comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class State:
    """``values`` is JSON; ``tensors`` are float32 on the CPU, or bytes (uint8). Clients are named by partition, as node
    ids may change."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def pairs(table: Mapping[int, Any]) -> list[list[Any]]:
    """A table with whole numbers as keys -> JSON, which has none."""
    return [[key, value] for key, value in table.items()]


def table_of(content: object, kind: type) -> dict[int, Any]:
    """Inverse of ``pairs``. Raises ValueError: it is none of whole numbers and values of this kind."""
    if not isinstance(content, list) or not all(isinstance(one, list) and len(one) == 2 for one in content):
        raise ValueError(f"a list of pairs is expected, not {str(content)[:60]}")
    if not all(type(key) is int and type(value) is kind for key, value in content):
        raise ValueError(f"pairs of int and {kind.__name__} are expected, not {str(content)[:60]}")
    return dict(content)


def numbers_of(content: object) -> list[float]:
    """The same list. Raises ValueError: it is none of finite numbers that are not negative."""
    if not isinstance(content, list) or not all(type(one) in (int, float) for one in content):
        raise ValueError(f"a list of numbers is expected, not {str(content)[:60]}")
    if not all(math.isfinite(one) and one >= 0 for one in content):
        raise ValueError("finite numbers are expected")
    return [float(one) for one in content]
