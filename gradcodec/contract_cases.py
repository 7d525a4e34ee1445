"""What codecs are tried on: layouts, updates, hostile bytes, and machines that compute otherwise.

``contract.py`` has the rules. Knows no codec.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from gradcodec.layout import Layout

SMALL = Layout.of(
    {"a.lora_A.weight": (3, 17), "a.lora_B.weight": (70, 3), "b.lora_A.weight": (1, 5), "b.lora_B.weight": (9, 5)}
)
LEAST = Layout.of({"a.lora_A.weight": (1, 1), "a.lora_B.weight": (1, 1)})
WIDE = Layout.of(
    {
        f"{layer}.{name}_proj.lora_{factor}.weight": (8, 96) if factor == "A" else (96, 8)
        for layer in "01"
        for name in "qv"
        for factor in "AB"
    }
)
_RANDOM, _FLIPPED = 40, 40
_EVERY_LENGTH = 2048


def update_of(layout: Layout, seed: int, scale: float = 1e-3) -> dict[str, Tensor]:
    """Low-rank and heavy-tailed, as gradients are; values of about ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for name, (rows, columns) in layout.shapes.items():
        left, right = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        tails, rest = (
            torch.randn(1, columns, generator=generator).abs(),
            torch.randn(rows, columns, generator=generator),
        )
        update[name] = scale * (left @ right * tails + 0.3 * rest)
    return update


def hostile_codes(honest: Sequence[bytes]) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """What a sender may do to a codec's streams: cut off, flipped, filled, made up; each with what it is."""
    chance = random.Random(0)

    def with_stream(place: int, stream: bytes) -> tuple[bytes, ...]:
        return (*honest[:place], stream, *honest[place + 1 :])

    for place, stream in enumerate(honest):
        size = len(stream)
        lengths = (
            [*range(size)] if size <= _EVERY_LENGTH else [*range(64), *range(64, size, 29), *range(size - 64, size)]
        )
        for length in lengths:
            yield f"stream {place} cut off after {length} of {size} bytes", with_stream(place, stream[:length])
        yield f"a byte behind stream {place}", with_stream(place, stream + b"\0")
        bits = range(8 * size)
        for bit in [*bits[:_FLIPPED], *chance.sample(bits, min(_FLIPPED, len(bits)))]:
            damaged = bytearray(stream)
            damaged[bit // 8] ^= 1 << bit % 8
            yield f"bit {bit} of stream {place} flipped", with_stream(place, bytes(damaged))
        for fill in (b"\0", b"\x7f", b"\x80", b"\xff"):
            yield f"stream {place} of {fill!r} alone", with_stream(place, fill * size)
            head = fill * min(8, size)
            yield f"stream {place} that begins with {head!r}", with_stream(place, head + stream[len(head) :])
    for number in range(_RANDOM):
        sizes = [chance.choice((chance.randrange(64), len(stream))) for stream in honest]
        yield f"random bytes, the {number}th", tuple(map(chance.randbytes, sizes))


class Allocations(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.nbytes)
        return made


class AnotherProcessor(TorchDispatchMode):
    """What sums, products of matrices and functions give in float32 differs in its last bit."""

    _SUMS = frozenset(
        [
            "mm",
            "addmm",
            "bmm",
            "baddbmm",
            "mv",
            "addmv",
            "dot",
            "convolution",
            "sum",
            "mean",
            "cumsum",
            "var",
            "std",
            "prod",
            "linalg_vector_norm",
        ]
    )
    _FUNCTIONS = frozenset(
        [
            "exp",
            "exp2",
            "log",
            "log2",
            "log1p",
            "sin",
            "cos",
            "tanh",
            "sigmoid",
            "erf",
            "gelu",
            "silu",
            "pow",
            "_softmax",
            "rsqrt",
            "_linalg_eigh",
        ]
    )
    _LAYERS = frozenset(
        ["native_batch_norm", "native_layer_norm", "native_group_norm", "_native_batch_norm_legit_no_training"]
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__.removesuffix("_") in self._SUMS | self._FUNCTIONS | self._LAYERS:
            made = tree_map_only(Tensor, self._rounded, made)
        return made

    def _rounded(self, made: Tensor) -> Tensor:
        if made.dtype == torch.float32:
            signs = torch.randint(0, 2, made.shape, generator=self._generator) * 2 - 1
            made.mul_(1 + signs.to(made.device) * 2.0**-23)
        return made


@contextmanager
def other_threads() -> Iterator[None]:
    """Sums are split over another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 if before != 3 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Machine:
    """Where the other end works: a device, and how it computes."""

    name: str
    device: str
    computing: Callable[[], AbstractContextManager[Any]]


def machines() -> list[Machine]:
    """Those that can be had here: a GPU only where there is one."""
    found = [
        Machine("a processor that rounds otherwise", "cpu", AnotherProcessor),
        Machine("another number of threads", "cpu", other_threads),
    ]
    return found + ([Machine("the GPU", "cuda", nullcontext)] if torch.cuda.is_available() else [])
