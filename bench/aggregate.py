"""What the server's aggregation of many payloads takes: clients a second, MB/s, and peak memory by number of clients.

    python -m bench.aggregate [--geometry 7b] [--clients 10,100,1000] [--bits 0.1] [--json OUT]

Replies go through the strategies that a run has (decode, check, weighted mean, FedAvg), one at a time as they come.
Every number of clients has a process of its own; peak memory is counted above what the process holds before the first
reply (the codec, the global adapter, one payload), in units of a dense update. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table

from bench.programs import ends_in_a_line
from bench.speed import GEOMETRIES, codec_for, layout_of, peak_bytes, update_of
from conf.output import provenance, write_json
from gradcodec.codec import Codec
from gradcodec.exchange import encode_update, max_payload_bytes
from gradcodec.frame import pack, unpack
from gradcodec.intake import Intake
from gradcodec.layout import Layout
from gradcodec.rounds import SameCodec
from gradcodec.settings import CodecSettings
from gradcodec.transfers import context_of
from strategies.broadcast import DenseBroadcaster
from strategies.build import build_inner
from strategies.coded import CodedReceiver
from strategies.federated import FederatedStrategy, Limits, Ways
from strategies.norms import NormBound
from strategies.outcomes import Downlink, Fault, Uplink
from strategies.roll import Roll
from strategies.sampling import Sampling
from strategies.settings import StrategySettings
from strategies.tensors import to_record
from strategies.wire import ARRAYS, METRICS, NUM_EXAMPLES, PARTITION, REPLY_METRICS, wrap_payload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="7b")
    parser.add_argument("--clients", default="10,100,1000", help="how many, one row each")
    parser.add_argument("--bits", type=float, default=0.1)
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    layout, rows = layout_of(args.geometry, 8), []
    spawn = multiprocessing.get_context("spawn")
    with ends_in_a_line():
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # encoding takes memory, too
            payload = pool.submit(payload_of, layout, args.bits).result()
        for count in map(int, args.clients.split(",")):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a process each: peak memory never falls
                rows.append(pool.submit(measure, layout, count, payload).result())
            Console(stderr=True).print(f"{count} clients: {rows[-1]['seconds']:.1f} s")
    table = Table(title=f"{args.geometry}: {layout.num_parameters:,} values, {args.bits:g} bits, one round")
    for column in ("clients", "seconds", "clients/s", "dense MB/s", "peak, dense updates"):
        table.add_column(column, justify="right")
    for row in rows:
        rates = [f"{row[key]:.2f}" for key in ("seconds", "clients_per_s", "dense_mb_per_s", "peak_updates")]
        table.add_row(str(row["clients"]), *rates)
    Console().print(table)
    if args.json is not None:
        about = {"geometry": args.geometry, "bits": args.bits, "made_with": provenance()}
        write_json({"rows": rows, **about}, args.json)


def payload_of(layout: Layout, bits: float) -> bytes:
    codec = codec_for(CodecSettings(), layout)
    return encode_update(
        update_of(layout), None, codec=codec, max_bytes=max_payload_bytes(bits, layout.num_parameters)
    )[0]


def measure(layout: Layout, num_clients: int, payload: bytes) -> dict[str, Any]:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # Message() wants them
    tiny = layout_of("tiny", 8)
    aggregate(*_strategy(tiny, 2), payload_of(tiny, 1.0))  # what libraries take at their first call is not ours
    strategy, codec = _strategy(layout, num_clients)
    held, start = peak_bytes("cpu", reset=True), time.perf_counter()
    aggregate(strategy, codec, payload)
    seconds = time.perf_counter() - start
    dense = 4 * layout.num_parameters
    return {
        "clients": num_clients,
        "seconds": seconds,
        "clients_per_s": num_clients / seconds,
        "dense_mb_per_s": 1e-6 * num_clients * dense / seconds,
        "payload_bytes": len(payload),
        "peak_updates": (peak_bytes("cpu") - held) / dense,
    }


def aggregate(strategy: FederatedStrategy, codec: Codec, payload: bytes) -> None:
    """One round of payloads that differ in whose they are alone."""
    adapter = to_record({name: torch.full(shape, 0.01) for name, shape in codec.layout.shapes.items()})
    messages = list(strategy.configure_train(1, adapter, ConfigRecord(), strategy.roll.grid))
    for number, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = str(number)

    def replies() -> Iterator[Message]:
        frame = unpack(payload, codec.num_streams)
        for partition, asked in enumerate(messages):
            metrics = MetricRecord(dict.fromkeys(REPLY_METRICS, 1.0))
            metrics[NUM_EXAMPLES], metrics[PARTITION] = 1 + partition % 7, partition
            own = pack(frame, context_of("", 1, partition))
            yield Message(RecordDict({ARRAYS: wrap_payload(own), METRICS: metrics}), reply_to=asked)

    arrays, _ = strategy.aggregate_train(1, replies())
    assert arrays is not None
    assert len(strategy.uplinks) == len(messages)


class AllPresent(Roll):
    """Node ``n + 1`` holds partition ``n``."""

    def update(self) -> dict[int, int]:
        return {partition: partition + 1 for partition in range(self.num_partitions)}


class Unobserved:
    """An observer that is not interested."""

    def uplink(self, uplink: Uplink) -> None: ...

    def downlink(self, downlink: Downlink) -> None: ...

    def fault(self, fault: Fault) -> None: ...

    def node_refused(self, node: int, reason: str) -> None: ...


def _strategy(layout: Layout, num_clients: int) -> tuple[FederatedStrategy, Codec]:
    codec = codec_for(CodecSettings(), layout)
    strategy = FederatedStrategy(
        build_inner(StrategySettings()),
        Ways(DenseBroadcaster(), CodedReceiver(Intake(codec, "", range(num_clients)), SameCodec(codec))),
        AllPresent(cast(Grid, None), num_clients, ConfigRecord(), Unobserved()),
        Sampling(num_clients, num_clients, seed=0),
        NormBound(None, None),
        Unobserved(),
        Limits(),
    )
    return strategy, codec


if __name__ == "__main__":
    main()
