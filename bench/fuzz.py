"""Hostile payloads against every decoder: each is decoded to finite blocks, or refused with CodecError.

    python -m bench.fuzz [--cases 100000] [--way up|down] [--seed 0] [--codecs learned,topk,...] [--json OUT]

On the way up these are clients' payloads against the server's decoder, on the way down a server's broadcasts (snapshots
and steps) against the client's.

Half of the cases are damaged as a network would (truncated, flipped bits, spliced); the other half carry a right
checksum, ids and length, so that the damage reaches the codec: random bodies, flipped bits, cut and lengthened
streams, extreme headers. Any other error than CodecError, a value that is not finite, or a decode of more than
``--seconds`` ends the run with 1 and prints the payload. Memory is bounded by the layout: the table says what it took.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.speed import codec_for
from conf.output import provenance, write_json
from gradcodec.broadcast import Held, catch_up, encode_step, pack_bundle, pack_snapshot, unpack_bundle
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.frame import HEADER_BYTES, Frame, pack, unpack, unpack_length
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
    parser.add_argument("--way", choices=("up", "down"), default="up", help="payloads or broadcasts (default up)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="the longest that one decode may take")
    parser.add_argument("--codecs", default=",".join(names_for_any_layout()), help="which codecs")
    parser.add_argument("--artifact")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = Layout.of(SHAPES)
    names = args.codecs.split(",")
    try:
        codecs = {name: codec_for(CodecSettings(name, artifact=args.artifact), layout) for name in names}
    except ValueError as error:
        sys.exit(f"error: {error}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    way = Payloads if args.way == "up" else Broadcasts
    targets: dict[str, Target] = {name: way(codec) for name, codec in codecs.items()}
    rows = attack(targets, args.cases, args.seed, args.seconds)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    what = "payloads" if args.way == "up" else "broadcasts"
    table = Table(title=f"{args.cases:,} hostile {what}; peak memory grew by {grown / 1e6:.0f} MB")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if args.json is not None:
        about = {"cases": args.cases, "way": args.way, "seed": args.seed, "grown_bytes": grown}
        write_json({"rows": rows, **about, "made_with": provenance()}, args.json)


class Target(Protocol):
    """What is attacked."""

    def hostile(self, chance: random.Random) -> bytes:
        """Bytes that no honest peer made."""
        ...

    def decode(self, data: bytes) -> Iterable[Tensor]:
        """What they decode to. Raises CodecError: they do not."""
        ...


class Payloads:
    """A server's decoder."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._honest = honest_payloads(codec)

    def hostile(self, chance: random.Random) -> bytes:
        return hostile(chance, self._codec, self._honest)

    def decode(self, data: bytes) -> Iterable[Tensor]:
        return decode_update(data, codec=self._codec).values()


class Broadcasts:
    """A client's decoder."""

    def __init__(self, codec: Codec) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = codec.layout.rank, codec.layout.num_columns
        self._codec = codec
        self._held = Held.at_start(torch.randn(shape, generator=generator))
        self._snapshot, self._steps, states = b"", list[bytes](), [self._held]
        for _ in range(2):  # the second step has side information and follows the snapshot
            step_RC = torch.randn(shape, generator=generator) * 1e-3
            step, after, _ = encode_step(step_RC, None, held=states[-1], codec=codec, max_bytes=700)
            self._snapshot = self._snapshot or pack_snapshot(after, codec.layout, with_start=True)
            self._steps.append(step)
            states.append(after)
        self._contexts = [b"/step/" + state.digest.encode() for state in states]
        self._honest = [pack_bundle(b"", self._steps), pack_bundle(self._snapshot, self._steps[1:])]

    def hostile(self, chance: random.Random) -> bytes:
        """Damaged as a whole, or in one of its parts; of a step's payload also behind a right checksum."""
        kind = chance.randrange(5)
        if kind == 0:
            return _damaged(chance, chance.choice(self._honest))
        change = chance.choice((_damaged, _noise, _extreme_head))
        if kind == 1:
            return pack_bundle(change(chance, self._snapshot), [])
        if kind == 2:
            return pack_bundle(_other_tensors(chance, self._snapshot), self._steps[1:])
        number = chance.randrange(2)
        before = [b"", self._snapshot][number]
        step, context = self._steps[number], self._contexts[number]
        if kind == 3:
            return pack_bundle(before, [change(chance, step)])
        count, offset = unpack_length(step, 2)
        for _ in range(count):
            _, offset = unpack_length(step, offset)
        head, payload = step[:offset], step[offset:]
        codes = list(unpack(payload, self._codec.num_streams, context).codes)
        which = chance.randrange(len(codes))
        codes[which] = change(chance, codes[which])
        forged = pack(Frame(self._codec.id, self._codec.layout.id, 1.0, tuple(codes)), context)
        head = chance.choice((head, _extreme_head(chance, head)))
        return pack_bundle(before, [head + forged])

    def decode(self, data: bytes) -> Iterable[Tensor]:
        held = catch_up(self._held, unpack_bundle(data), layout=self._codec.layout, codec_at=lambda _: self._codec)
        return [held.adapter_RC]


def attack(targets: dict[str, Target], num_cases: int, seed: int, most_seconds: float) -> list[dict[str, Any]]:
    """Tries them in turn and ends the program at the first payload that does what none may do.

    Args:
        targets: by the codec's name.
        num_cases: of all codecs together.
        seed: of the payloads.
        most_seconds: that one decode may take.
    """
    names = list(targets)
    chance = random.Random(seed)
    outcomes = {name: Counter[str]() for name in names}
    slowest = dict.fromkeys(names, 0.0)
    for number in track(range(num_cases), "fuzzing", console=Console(stderr=True), transient=True):
        name = names[number % len(names)]
        payload = targets[name].hostile(chance)
        start = time.perf_counter()
        try:
            decoded = list(targets[name].decode(payload))
        except CodecError:
            outcomes[name]["refused"] += 1
        except Exception as error:
            sys.exit(f"error: {name} raised {error!r} for payload {payload.hex()}")
        else:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in decoded):
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


def _other_tensors(chance: random.Random, snapshot: bytes) -> bytes:
    """A safetensors file whose head is whole JSON and tells of other tensors."""
    size = int.from_bytes(snapshot[:8], "little")
    head: dict[str, dict[str, Any]] = json.loads(snapshot[8 : 8 + size])
    name = chance.choice(sorted(head))
    match chance.randrange(4):
        case 0:
            head[name]["dtype"] = chance.choice(("F64", "F32", "F16", "I8", "U8", "I64", "BOOL", "C64", "nonsense"))
        case 1:
            head[name]["shape"] = [chance.choice((0, 1, -1, 7, 1 << 31, 1 << 62)) for _ in range(chance.randrange(4))]
        case 2:
            head[name]["data_offsets"] = sorted(chance.randrange(len(snapshot)) for _ in range(2))
        case _:
            head[chance.choice(("moved", "start", "side", "grid", "other"))] = head.pop(name)
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + snapshot[8 + size :]


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
