"""What a codec takes: values that it has learned, operations, seconds and memory for one update."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gradcodec.training.coding import Coding
from gradcodec.training.recording import Update

Result = TypeVar("Result")


@dataclass(frozen=True)
class CodecWork:
    """One codec on one update, on the CPU.

    Attributes:
        codec: which.
        num_learned: values of its artifact; 0 where nothing is learned.
        payload_bytes: of the update.
        encode_operations: floating-point operations of matrix products and convolutions, two for each multiplication
            and addition; what a range coder and element-wise steps take is not among them.
        decode_operations: the same for decoding.
        encode_seconds: median, the check of what was encoded included.
        decode_seconds: median.
        peak_bytes: the most that encoding and decoding held beyond what was there before; None: this system does not
            say.
    """

    codec: str
    num_learned: int
    payload_bytes: int
    encode_operations: int
    decode_operations: int
    encode_seconds: float
    decode_seconds: float
    peak_bytes: int | None


def work_of(coding: Coding, update: Update, num_learned: int, repeats: int = 3) -> CodecWork:
    """Encodes and decodes one update ``repeats`` times, and once more to count."""
    encode = partial(coding.payload, update.blocks_RC, update.round)
    encode_operations, payload = counted(encode)
    decode = partial(coding.decoded, payload, update.round)
    decode_operations, _ = counted(decode)
    gc.collect()
    before = peak_bytes(reset=True)
    encode_seconds, _ = timed(encode, repeats)
    decode_seconds, _ = timed(decode, repeats)
    peak = peak_bytes()
    return CodecWork(
        coding.name,
        num_learned,
        len(payload),
        encode_operations,
        decode_operations,
        encode_seconds,
        decode_seconds,
        None if before is None or peak is None else peak - before,
    )


def counted(work: Callable[[], Result]) -> tuple[int, Result]:
    """Floating-point operations of matrix products and convolutions, and the result."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


def timed(work: Callable[[], Result], repeats: int, done: Callable[[], None] = lambda: None) -> tuple[float, Result]:
    """Median seconds of ``repeats`` runs, each until ``done`` returns, and the last result."""
    seconds = []
    for number in range(repeats):
        start = time.perf_counter()
        result = work()
        done()
        seconds.append(time.perf_counter() - start)
        if number < repeats - 1:
            del result  # or its memory would count for the next run
    return median(seconds), result


def peak_bytes(reset: bool = False) -> int | None:
    """The most memory that this process held; with ``reset`` counted anew from here. None: the system does not say."""
    with suppress(OSError, ValueError):
        if reset:
            with suppress(AttributeError):  # what this process has freed and kept would be used again unseen
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
        (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
        return 1024 * int(line.split()[1])
    return None


def learned_values(tensors: Mapping[str, Tensor]) -> int:
    """How many values an artifact holds."""
    return sum(tensor.numel() for tensor in tensors.values())
