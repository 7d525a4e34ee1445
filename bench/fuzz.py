"""Hostile payloads against every decoder: each is decoded to finite blocks, or refused with CodecError.

    python -m bench.fuzz [--cases 100000] [--seed 0] [--codecs learned,topk,...] [--json OUT]

Half of the cases are damaged as a network would (truncated, flipped bits, spliced); the other half carry a right
checksum, ids and length, so that the damage reaches the codec: random bodies, flipped bits, cut and lengthened
streams, extreme headers. Any other error than CodecError, a value that is not finite, or a decode of more than
``--seconds`` ends the run with 1 and prints the payload. Memory is bounded by the layout: the table says what it took.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from conf.output import provenance, write_json
from gradcodec.build import build_codec
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.frame import HEADER_BYTES, Frame, pack, unpack
from gradcodec.layout import Layout
from gradcodec.registry import names_for_any_layout
from gradcodec.settings import CodecSettings

SHAPES = {
    f"{layer}.{module}.lora_{factor}.weight": (8, 96) if factor == "A" else (64, 8)
    for layer in range(2)
    for module in "qv"
    for factor in "AB"
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="the longest that one decode may take")
    parser.add_argument("--codecs", default=",".join(names_for_any_layout()), help="which codecs")
    parser.add_argument("--artifact", default="assets/codec")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = Layout.of(SHAPES)
    names = args.codecs.split(",")
    try:
        codecs = {name: build_codec(CodecSettings(name, artifact=args.artifact), layout) for name in names}
    except ValueError as error:
        sys.exit(f"error: {error}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = attack(codecs, args.cases, args.seed, args.seconds)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    table = Table(title=f"{args.cases:,} hostile payloads; peak memory grew by {grown / 1e6:.0f} MB")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if args.json is not None:
        about = {"cases": args.cases, "seed": args.seed, "grown_bytes": grown}
        write_json({"rows": rows, **about, "made_with": provenance()}, args.json)


def attack(codecs: dict[str, Codec], num_cases: int, seed: int, most_seconds: float) -> list[dict[str, Any]]:
    """Tries the codecs in turn and ends the program at the first payload that does what none may do.

    Args:
        codecs: by name.
        num_cases: of all codecs together.
        seed: of the payloads.
        most_seconds: that one decode may take.
    """
    names = list(codecs)
    chance = random.Random(seed)
    outcomes = {name: Counter[str]() for name in names}
    slowest = dict.fromkeys(names, 0.0)
    honest = {name: honest_payloads(codec) for name, codec in codecs.items()}
    for number in track(range(num_cases), "fuzzing", console=Console(stderr=True), transient=True):
        name = names[number % len(names)]
        payload = hostile(chance, codecs[name], honest[name])
        start = time.perf_counter()
        try:
            update = decode_update(payload, codec=codecs[name])
        except CodecError:
            outcomes[name]["refused"] += 1
        except Exception as error:
            sys.exit(f"error: {name} raised {error!r} for payload {payload.hex()}")
        else:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in update.values()):
                sys.exit(f"error: {name} decoded values that are not finite from payload {payload.hex()}")
            outcomes[name]["decoded"] += 1
        slowest[name] = max(slowest[name], time.perf_counter() - start)
        if slowest[name] > most_seconds:
            sys.exit(f"error: {name} took {slowest[name]:.1f} s for payload {payload.hex()}")
    return [
        {"codec": name, **{k: outcomes[name][k] for k in ("refused", "decoded")}, "slowest_ms": 1000 * slowest[name]}
        for name in names
    ]


def hostile(chance: random.Random, codec: Codec, honest: list[bytes]) -> bytes:
    """One payload that no encoder made."""
    payload = chance.choice(honest)
    if chance.random() < 0.5:
        return _damaged(chance, payload)
    codes = list(unpack(payload, codec.num_streams).codes)
    which = chance.randrange(len(codes))
    codes[which] = chance.choice((_damaged, _noise, _extreme_head))(chance, codes[which])
    gain = chance.choice((1.0, 1.0, 1.0, 0.0, -1.0, 65504.0, 6e-8))
    return pack(Frame(codec.id, codec.layout.id, gain, tuple(codes)))


def _damaged(chance: random.Random, data: bytes) -> bytes:
    kind = chance.randrange(4)
    place = chance.randrange(len(data) + 1)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + chance.randbytes(chance.randrange(64)) + data[place:]
    if kind == 2:
        return data + b"\xff" * chance.randrange(1, 4096)
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 9) if data else 0):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _noise(chance: random.Random, data: bytes) -> bytes:
    return chance.randbytes(chance.randrange(2 * len(data) + 8))


def _extreme_head(chance: random.Random, data: bytes) -> bytes:
    """The first bytes, where counts, steps and scales stand, at their limits."""
    size = min(chance.randrange(1, 9), len(data))
    return bytes(chance.choice((0x00, 0x7F, 0x80, 0xFF, 0x7C, 0x3F)) for _ in range(size)) + data[size:]


def honest_payloads(codec: Codec) -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for bits in (0.1, 0.5, 2.0):
        blocks_RC = torch.randn(codec.layout.rank, codec.layout.num_columns, generator=generator)
        budget = max(max_payload_bytes(bits, codec.layout.num_parameters), HEADER_BYTES + 64)
        update = codec.layout.to_update(blocks_RC * math.pow(10, -3))
        found.append(encode_update(update, None, codec=codec, max_bytes=budget)[0])
    return found


if __name__ == "__main__":
    main()
