"""How fast the codecs encode and decode one update here, beside each other in one run.

    python -m bench.speed [--layers 4] [--width 1024] [--rank 8] [--bits 0.5] [--repeats 3] [--json OUT]

LLaMA-7B geometry is ``--layers 32 --width 4096`` (8,388,608 values). Figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from conf.output import provenance, write_json
from gradcodec.build import CodecSettings, build_codec
from gradcodec.codec import Codec, IdentityCodec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.gauge import principal_axes
from gradcodec.layout import Layout

Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, default in (("layers", 4), ("width", 1024), ("rank", 8), ("repeats", 3)):
        parser.add_argument(f"--{key}", type=int, default=default)
    parser.add_argument("--bits", type=float, default=0.5, help="budget of the codecs that have a rate")
    parser.add_argument("--artifact", default="assets/codec")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (f"{layer}.{module}" for layer in range(args.layers) for module in "qkvo"):
        shapes[f"{name}.lora_A.weight"] = (args.rank, args.width)
        shapes[f"{name}.lora_B.weight"] = (args.width, args.rank)
    layout = Layout.of(shapes)
    torch.manual_seed(0)
    blocks = torch.randn(layout.rank, layout.num_columns) * torch.randn(layout.rank, layout.num_columns).exp()
    side = principal_axes(blocks, layout)
    codecs: dict[str, Codec] = {
        "identity": IdentityCodec(layout),
        "learned": build_codec(CodecSettings(artifact=args.artifact), layout),
    }
    rows = []
    for name, codec in codecs.items():
        budget = None if name == "identity" else max_payload_bytes(args.bits, layout.num_parameters)
        update = layout.to_update(blocks)
        encode_s, (payload, _) = timed(
            partial(encode_update, update, None, codec=codec, max_bytes=budget, side=side), args.repeats
        )
        decode_s, _ = timed(partial(decode_update, payload, codec=codec, side=side), args.repeats)
        rows.append(
            {
                "codec": name,
                "num_parameters": layout.num_parameters,
                "payload_bytes": len(payload),
                "encode_seconds": encode_s,
                "decode_seconds": decode_s,
                "encode_mb_per_s": 4e-6 * layout.num_parameters / encode_s,
                "decode_mb_per_s": 4e-6 * layout.num_parameters / decode_s,
            }
        )
    table = Table(title=f"{layout.num_parameters:,} parameters, {torch.get_num_threads()} threads, CPU")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory of the process: {peak / 1e6:.0f} MB; one update: {4e-6 * layout.num_parameters:.0f} MB")
    if args.json is not None:
        write_json({"rows": rows, "peak_process_bytes": peak, "made_with": provenance()}, args.json)


def timed(work: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Median seconds of ``repeats`` runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return median(seconds), result


if __name__ == "__main__":
    main()
