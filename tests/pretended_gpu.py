"""A device that is not there: its tensors lie in the host's memory, but behave as those of a GPU where it matters.

They cannot be mixed with the host's tensors, NumPy cannot read them, and every copy to the host is counted. So a test
without a GPU sees what would cross over, and what would be refused. It says nothing of a GPU's own kernels.

torch then has an accelerator, for good, and libraries would take to it: only in a process of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

Result = TypeVar("Result")
aten = torch.ops.aten


class _FarTensor(Tensor):
    """Wraps a tensor of the host, ``near``, which nothing else can reach."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, near: Tensor) -> _FarTensor:
        sizes = near.size(), near.stride(), near.storage_offset()
        far: _FarTensor = Tensor._make_wrapper_subclass(
            cls, *sizes, dtype=near.dtype, device=torch.device("pretended", 0)
        )
        far.near = near
        return far

    def tolist(self) -> Any:  # torch's own serves no subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{op} on a pretended device outside of `pretended_gpu`")


class PretendedGpu(TorchDispatchMode):
    """Runs what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.device("pretended", 0)
        self.copied_to_host: list[int] = []  # bytes of every copy

    def moved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """To the device."""
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def copies_of(self, work: Callable[[], Result]) -> tuple[Result, list[int]]:
        """What it gives, and the bytes of every copy to the host that it made."""
        before = len(self.copied_to_host)
        made = work()
        return made, self.copied_to_host[before:]

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_far = any(isinstance(tensor, _FarTensor) for tensor in tensors)
        stays_far = is_far
        if (device := kwargs.get("device")) is not None:  # the op makes a tensor, or moves one
            stays_far, kwargs["device"] = torch.device(device) == self.device, torch.device("cpu")
        elif op is aten.copy_.default:
            stays_far = isinstance(args[0], _FarTensor)
        elif op is aten._local_scalar_dense.default:
            stays_far = False
        elif is_far and any(tensor.ndim and not isinstance(tensor, _FarTensor) for tensor in tensors):
            raise RuntimeError(f"{op}: tensors on the host and on a device")
        made = op(*pytree.tree_map(_near, args), **pytree.tree_map(_near, kwargs))
        if is_far and not stays_far:
            self.copied_to_host.append(made.nbytes if isinstance(made, Tensor) else 8)
        return pytree.tree_map_only(Tensor, _FarTensor, made) if stays_far else made


def _near(value: Any) -> Any:
    return value.near if isinstance(value, _FarTensor) else value


@functools.cache
def _register() -> None:
    """Once in a process."""
    _setup_privateuseone_for_python_backend("pretended")


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Within it the device ``pretended:0`` exists."""
    _register()
    with PretendedGpu() as gpu:
        yield gpu
