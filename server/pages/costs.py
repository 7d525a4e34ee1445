"""Of a run's report what it cost: bytes, everything counted, and seconds."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from conf.console import bytes_text, seconds_text
from report import charts
from report.charts import Cell, Row
from report.page import Facts, Figure, Part, Table, Text
from server.pages.clients import Withheld
from server.records.account import transfer_seconds
from server.records.results import RunResults

PARTS = {
    "up": "payloads, from clients to the server",
    "down": "adapters or steps, to the clients of each round, with what they had missed",
    "delivery": "would bring every client to the final adapter",
    "artifact": "a copy of the codec for each client",
    "recording": "what the codec was trained on",
}
"""Of an account that add up to its total."""


def size_parts(results: RunResults) -> list[Part]:
    if not results.uplinks:
        return []
    account, clients = results.account(), results.settings.federation.num_clients
    sizes = dataclasses.asdict(account)
    rows: list[list[Cell]] = [[part, sizes[part], what] for part, what in PARTS.items()]
    rows += [["of the bytes down: catch-up", account.catch_up, "steps that clients had missed"]]
    rows += [["of the bytes down: snapshots", account.snapshots, "all of an adapter, for who held none, and keys"]]
    rows += [
        ["of both ways: evaluation", account.evaluation, "adapters to nodes that evaluate them, and their answers"]
    ]
    rows += [["total", account.total, "up, down, delivery, artifact and recording"]]
    drawn: list[Row] = [{"part": part, "bytes": sizes[part]} for part in PARTS]
    links = transfer_seconds(account.up / clients, (account.down + account.delivery) / clients)
    alt = f"The parts that {bytes_text(account.total)} are made of; the table below says what each is."
    return [
        Figure("Where the bytes go", alt, charts.bars(drawn, "part", "bytes"), drawn),
        Table("Everything counted", ("part", "bytes", "what it is"), rows),
        Table("What a client waits for its link in the whole run", ("link", "seconds"), [*links.items()]),
    ]


def time_parts(results: RunResults, withheld: Withheld) -> list[Part]:
    decode = sum(uplink.seconds_decode for uplink in results.uplinks)
    if not results.uplinks:
        return []
    if withheld.losses:
        facts = Facts({"seconds in all": results.seconds, "seconds of decoding, server": decode})
        return [facts, Text("How long clients took is withheld: it would tell how much data they have.")]
    train = sum(uplink.seconds_train for uplink in results.uplinks)
    encode = sum(uplink.seconds_encode for uplink in results.uplinks)
    rows: list[Row] = [
        {"phase": "training", "seconds": train},
        {"phase": "encoding", "seconds": encode},
        {"phase": "decoding", "seconds": decode},
        {"phase": "the rest", "seconds": max(0.0, results.seconds - _busy(results) - decode)},
    ]
    alt = (
        f"The run took {seconds_text(results.seconds)}. Training and encoding are added up over clients, which may "
        "work at the same time. The rest is what remains without the slowest clients' work and the server's decoding: "
        "evaluation, sending, waiting."
    )
    return [Figure("Seconds by phase", alt, charts.bars(rows, "phase", "seconds"), rows)]


def _busy(results: RunResults) -> float:
    """Seconds for which the run waited for clients' work at least: of each round the slowest; where they take turns,
    all of them."""
    by_round: dict[int, list[float]] = defaultdict(list)
    for uplink in results.uplinks:
        by_round[uplink.server_round].append(uplink.seconds_train + uplink.seconds_encode)
    one_by_one = results.settings.backend.name == "inprocess"
    return sum(sum(seconds) if one_by_one else max(seconds) for seconds in by_round.values())
