"""Flower's records <-> torch tensors, on the server's side."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from gradcodec.errors import CodecError
from strategies.wire import array_of, arrays_of

MAX_VALUE = 1e6
"""No weight of an adapter is ever near this; larger ones are an attack or a diverged client."""


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """float32 tensors -> Arrays of the same names."""
    return ArrayRecord({name: array_of(tensor.numpy()) for name, tensor in tensors.items()})


def moved_to_record(tensors: dict[str, Tensor]) -> ArrayRecord:
    """The same a tensor at a time: the dict is empty afterwards, and two copies of all were never held."""
    return ArrayRecord({name: array_of(tensors.pop(name).numpy()) for name in list(tensors)})


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """Inverse of both."""
    return {name: torch.from_numpy(array) for name, array in arrays_of(record).items()}


def distance(adapter: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The L2 norm of what lies between two adapters of the same tensors; in float64, a tensor at a time."""
    squares = (float((adapter[name] - tensor).double().square().sum()) for name, tensor in other.items())
    return math.sqrt(sum(squares))


def check_values(name: str, tensor: Tensor) -> None:
    """Raises CodecError: a value is NaN, infinite or beyond ``MAX_VALUE``, so that sums would overflow."""
    if not bool((tensor.abs() <= MAX_VALUE).all()):
        raise CodecError(f"tensor {name!r} holds NaN, infinity or a value beyond {MAX_VALUE:g}")
