"""What it costs a client to catch up after so many missed rounds: bytes, and seconds at the client.

    python -m bench.catch_up [--geometry tiny|7b|70b] [--missed 1,5,20,100] [--bits 0.5] [--codec learned] [--json OUT]

Steps are low-rank and heavy-tailed, as updates are, and independent of each other; directions along the width are
derived for each of them, as in a run, from random ones in the base model's place. The server sends the steps that were
missed, or a snapshot where that is smaller, or makes a key, all of the movement in one payload, where that is less for
all clients together; the table has each, and the adapter in float32.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.programs import ends_in_a_line
from bench.speed import GEOMETRIES, codecs_for, layout_of, update_of
from conf.output import provenance, write_json
from gradcodec.broadcast import Bundle, Held, catch_up, encode_step, key_bytes, pack_snapshot
from gradcodec.codec import Codec
from gradcodec.exchange import max_payload_bytes
from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.settings import CodecSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="tiny")
    parser.add_argument("--missed", default="1,5,20,100", help="rounds (default 1,5,20,100)")
    parser.add_argument("--bits", type=float, default=0.5, help="of a step, per parameter (default 0.5)")
    parser.add_argument("--codec", default="learned")
    parser.add_argument("--artifact")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    with ends_in_a_line():
        missed = sorted({int(number) for number in args.missed.split(",")})
        if missed[0] < 1:
            raise ValueError(f"--missed {args.missed}: numbers from 1 on are expected")
        settings = CodecSettings(args.codec, artifact=args.artifact)
        rows = measure(args.geometry, missed, args.bits, settings)
    table = Table(title=f"catching up, {args.geometry}, steps of at most {args.bits:g} bits a parameter")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.json is not None:
        about = {"geometry": args.geometry, "bits": args.bits, "codec": args.codec}
        write_json({"rows": rows, **about, "made_with": provenance()}, args.json)


def measure(geometry: str, missed: list[int], bits: float, settings: CodecSettings) -> list[dict[str, Any]]:
    """One row for each number of missed rounds. Raises ValueError: the codec cannot be built."""
    layout = layout_of(geometry, 8)
    codecs = codecs_for(settings, layout)
    start = held = Held.at_start(torch.zeros(layout.rank, layout.num_columns))

    def codec_at(held: Held) -> Codec:
        return codecs.at(layout.to_update(held.adapter_RC))

    carried_RC, steps, rows = None, [], []
    for number in track(range(1, missed[-1] + 1), "steps", console=Console(stderr=True), transient=True):
        step_RC = layout.to_blocks(update_of(layout, seed=1 + number))
        data, held, residual = encode_step(
            step_RC,
            carried_RC,
            held=held,
            codec=codec_at(held),
            max_bytes=max_payload_bytes(bits, layout.num_parameters),
        )
        carried_RC = residual.error_RC
        steps.append(data)
        if number not in missed:
            continue
        snapshot = pack_snapshot(held, layout, with_start=False)
        wanted_RC = held.moved_RC + carried_RC
        room = key_bytes(wanted_RC, step_RC, layout, max_payload_bytes(bits, layout.num_parameters))
        key, keyed, _ = encode_step(wanted_RC, None, held=start, codec=codec_at(start), max_bytes=room)
        sent = {"steps": Bundle(b"", tuple(steps)), "snapshot": Bundle(snapshot, ()), "key": Bundle(b"", (key,))}
        row: dict[str, Any] = {"missed": number}
        for name, bundle in sent.items():
            began = time.perf_counter()
            reached = catch_up(start, bundle, layout=layout, codec_at=codec_at)
            seconds = time.perf_counter() - began
            assert reached.digest == (keyed if name == "key" else held).digest
            num_bytes = len(bundle.snapshot) + sum(map(len, bundle.steps))
            row |= {f"{name}_bytes": num_bytes, f"{name}_seconds": seconds}
        left_out = squared_distance(wanted_RC, keyed.moved_RC, 1.0) / inner_product(step_RC, step_RC)
        row |= {"key_leaves_out": left_out, "float32_bytes": 4 * layout.num_parameters}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
