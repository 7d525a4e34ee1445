"""How fast the codecs encode and decode one update here, and what memory they take, beside each other in one run.

    python -m bench.speed [--geometry tiny|7b|70b] [--bits 0.1,0.5] [--codecs learned,...] [--device cpu] [--json OUT]

``7b`` is LLaMA-7B with rank 8 on q, k, v, o: 8,388,608 values; ``70b`` LLaMA-2-70B with the same adapter. Every codec
runs in a process of its own, which holds the update when the clock starts; its peak memory is counted from there, the
update itself included, in units of the update. With ``--device`` the update lies there when `learned` encodes it, and
there the decoded one stays: seconds are those until the device is done, and memory is the device's. Encoding contains
what every payload goes through: the check that it adds no energy, and the residual. Seconds are medians over the
repeats. *A round* is what the directions along the width take, which `learned` derives once a round on each end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters.spaces import NUM_DIRECTIONS
from bench.programs import ends_in_a_line
from conf.output import provenance, write_json
from gradcodec.build import build_codec
from gradcodec.codec import Codec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.layout import Layout
from gradcodec.learned.basis import Prior
from gradcodec.learned.codec import LearnedCodec
from gradcodec.registry import names_for_any_layout, names_with_a_rate
from gradcodec.rounds import Codecs, DerivedCodecs, SameCodec
from gradcodec.settings import CodecSettings

Result = TypeVar("Result")
Widths = tuple[tuple[str, int, int], ...]
GEOMETRIES: dict[str, tuple[int, Widths]] = {
    "tiny": (4, tuple((module, 1024, 1024) for module in "qkvo")),
    "7b": (32, tuple((module, 4096, 4096) for module in "qkvo")),
    "70b": (80, (("q", 8192, 8192), ("k", 8192, 1024), ("v", 8192, 1024), ("o", 8192, 8192))),
}
"""Layers, and per module its inputs and outputs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--bits", default="0.1,0.5", help="budgets of the codecs that have a rate")
    parser.add_argument("--codecs", default=",".join(names_for_any_layout()), help="which codecs")
    parser.add_argument("--artifact")
    parser.add_argument("--device", default="cpu", help="where `learned` works, as torch says it: cpu, cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    names = args.codecs.split(",")
    layout = layout_of(args.geometry, args.rank)
    try:
        device = device_name(args.device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ends_in_a_line():
        for name in names:
            for bits in [float(rate) for rate in args.bits.split(",")] if name in names_with_a_rate() else [None]:
                Console(stderr=True).print(f"{name}{'' if bits is None else f' at {bits:g} bits'} ...")
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a process each: peak memory never falls
                    one = partial(measure, name, layout, bits, args.artifact, args.repeats, args.threads, args.device)
                    rows.append(pool.submit(one).result())
    print_table(rows, f"{args.geometry}: {layout.num_parameters:,} values, {args.threads} threads, {args.device}")
    if args.json is not None:
        about = {"geometry": args.geometry, "num_parameters": layout.num_parameters, "threads": args.threads}
        write_json({"rows": rows, **about, "device": device, "made_with": provenance()}, args.json)


def layout_of(geometry: str, rank: int) -> Layout:
    num_layers, modules = GEOMETRIES[geometry]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(num_layers):
        for module, inputs, outputs in modules:
            shapes[f"{layer}.{module}.lora_A.weight"] = (rank, inputs)
            shapes[f"{layer}.{module}.lora_B.weight"] = (outputs, rank)
    return Layout.of(shapes)


def device_name(device: str) -> str:
    """As results say it. Raises ValueError: there is none."""
    if not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA device that torch sees")
    return torch.cuda.get_device_name(device)


def update_of(layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """Low-rank, heavy-tailed factors, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for block in layout.blocks:
        falling = torch.exp2(-0.7 * torch.arange(block.rank))
        tails = torch.randn(block.width, generator=generator).exp()
        factor = torch.randn(block.rank, block.width, generator=generator) * falling[:, None] * tails
        update[block.name] = (factor.T if block.transposed else factor).contiguous()
    return update


def codecs_for(settings: CodecSettings, layout: Layout, device: torch.device | str = "cpu") -> Codecs:
    """The codec of every round; directions that would be derived from a base model are drawn at random, one set for
    all tensors of a width."""
    codec = build_codec(settings, layout, device)
    if not isinstance(codec, LearnedCodec) or not codec.tables.serve_derived:
        return SameCodec(codec)
    generator = torch.Generator().manual_seed(0)
    priors = {
        width: Prior(
            torch.linalg.qr(torch.randn(width, min(NUM_DIRECTIONS, width), generator=generator))[0],
            torch.arange(1.0, min(NUM_DIRECTIONS, width) + 1) ** -1,
        )
        for width in {block.width for block in layout.blocks}
    }
    start = {name: torch.zeros(shape) for name, shape in layout.shapes.items()}
    return DerivedCodecs(codec, {block.name: priors[block.width] for block in layout.blocks}, start)


def codec_for(settings: CodecSettings, layout: Layout, device: torch.device | str = "cpu") -> Codec:
    """The codec of a round that some update led to."""
    return codecs_for(settings, layout, device).at(update_of(layout, seed=1))


def measure(
    name: str, layout: Layout, bits: float | None, artifact: str | None, repeats: int, threads: int, device: str
) -> dict[str, Any]:
    """One codec at one rate."""
    torch.set_num_threads(threads)
    device = device if name == "learned" else "cpu"
    codecs, moved = codecs_for(CodecSettings(name=name, artifact=artifact), layout, device), update_of(layout, seed=1)
    started = time.perf_counter()
    codec = codecs.at(moved)
    derive_s = time.perf_counter() - started
    side = codec.side_information(layout.to_blocks(moved))
    del moved
    update = {key: tensor.to(device) for key, tensor in update_of(layout).items()}
    budget = None if bits is None else max_payload_bytes(bits, layout.num_parameters)
    held = peak_bytes(device, reset=True)
    encode = partial(encode_update, update, None, codec=codec, max_bytes=budget, side=side)
    encode_s, (payload, residual) = timed(encode, repeats, device)
    del residual  # the side that decodes has none
    decode_s, _ = timed(partial(decode_update, payload, codec=codec, side=side), repeats, device)
    update_bytes = 4 * layout.num_parameters
    return {
        "codec": name,
        "bits": 8 * len(payload) / layout.num_parameters,
        "payload_bytes": len(payload),
        "encode_seconds": encode_s,
        "decode_seconds": decode_s,
        "round_seconds": derive_s,
        "encode_mb_per_s": 1e-6 * update_bytes / encode_s,
        "decode_mb_per_s": 1e-6 * update_bytes / decode_s,
        "peak_updates": 1 + (peak_bytes(device) - held) / update_bytes,
    }


def timed(work: Callable[[], Result], repeats: int, device: torch.device | str = "cpu") -> tuple[float, Result]:
    """Median seconds of ``repeats`` runs, until the device is done, and the last result."""
    seconds = []
    for number in range(repeats):
        start = time.perf_counter()
        result = work()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
        if number < repeats - 1:
            del result  # or its memory would count for the next run
    return median(seconds), result


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in (
        "codec",
        "bits",
        "payload",
        "encode s",
        "decode s",
        "a round s",
        "encode MB/s",
        "peak, updates",
    ):
        table.add_column(column, justify="left" if column == "codec" else "right", no_wrap=True)
    for row in rows:
        figures = [f"{row[key]:.2f}" for key in ("encode_seconds", "decode_seconds", "round_seconds")]
        figures.append(f"{row['encode_mb_per_s']:.0f}")
        table.add_row(
            row["codec"], f"{row['bits']:.3f}", f"{row['payload_bytes']:,}", *figures, f"{row['peak_updates']:.1f}"
        )
    Console(width=100 if not sys.stdout.isatty() else None).print(table)


def wait_for(device: torch.device | str) -> None:
    """Until it has done all that it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device | str, reset: bool = False) -> int:
    """The most that was held of a GPU's memory, or by this process; with ``reset`` counted anew from here."""
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.max_memory_allocated(device))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    (line,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
