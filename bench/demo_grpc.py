"""The coded federation as a real deployment on loopback: one SuperLink, two nodes, gRPC, TLS, node keys.

    python -m bench.demo_grpc [--rounds 3] [--output outputs/demo-grpc] [key=value ...]

Starts the programs that a user would start (``python -m server``, ``python -m client``), runs the same federation in
simulation beside it, compares the payloads' digests round by round, counts the bytes on the wire with a relay before
each node, and ends every process, also after Ctrl-C. What idle nodes send is counted after the run: that is polling.
Writes results.json and a page, report.html, into the output folder.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as ConsoleTable

from bench.deployment import deployment
from bench.programs import ends_in_a_line, run_program
from bench.relay import CountingRelay
from conf.output import open_output, provenance, write_json
from report import charts
from report.charts import Cell, Row
from report.page import Facts, Figure, Section, Table, write_page

NUM_NODES = 2
IDLE_SECONDS = 15.0
"""Several of the node's polls, which are three seconds apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo-grpc"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for both runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with ends_in_a_line("stopped; all processes are ended"):
        output = open_output(args.output.absolute())
        common = [f"federation.rounds={args.rounds}", f"federation.num_clients={NUM_NODES}"]
        common += [f"federation.clients_per_round={NUM_NODES}", *args.overrides]
        common += [f"run_id=demo-{uuid.uuid4().hex[:12]}"]  # one for both: a payload's checksum holds it
        results = compare(output, common)
    write_json(results, output / "results.json")
    page = "report.html"
    write_page(output / page, "CG-FedLLM over gRPC", lead_of(results), sections_of(results), results["made_with"])
    print_tables(results)
    print(f"results: {output / 'results.json'}\nreport:  {output / page}")
    if not results["payloads_equal"]:
        sys.exit("error: gRPC and simulation sent different payloads")


def compare(output: Path, common: list[str]) -> dict[str, Any]:
    """Runs the federation over gRPC and in simulation. Returns losses, payloads and bytes on the wire."""
    console = Console(stderr=True)
    console.rule("deployment: SuperLink and two nodes over gRPC, TLS, node keys")
    with deployment(output / "demo-deploy", NUM_NODES) as place:
        relays = place.relays
        before, start = counts_of(relays), time.monotonic()
        deployed = federate(output / "grpc", [*common, "backend=superlink"], place.flwr_home)
        after, seconds = counts_of(relays), time.monotonic() - start
        time.sleep(IDLE_SECONDS)
        idle = counts_of(relays)
    share = seconds / IDLE_SECONDS
    wire = [
        {
            way: {"all": after[i][way] - before[i][way], "polling": round(share * (idle[i][way] - after[i][way]))}
            for way in ("up", "down")
        }
        for i in range(NUM_NODES)
    ]
    console.rule("the same federation in simulation")
    simulated = federate(output / "simulation", [*common, "backend=simulation"])
    digests = {name: payload_digests(run) for name, run in (("grpc", deployed), ("simulation", simulated))}
    return {
        "payloads_equal": digests["grpc"] == digests["simulation"],
        "payload_digests": digests,
        "heldout_loss": {"grpc": deployed["heldout_loss"], "simulation": simulated["heldout_loss"]},
        "payload_bytes_per_client_round": deployed["uplink_payload_bytes_per_client_round"],
        "wire_bytes_per_client": wire,
        "rounds": len(deployed["heldout_loss"]) - 1,
        "seconds": seconds,
        "made_with": provenance(),
    }


def counts_of(relays: list[CountingRelay]) -> list[dict[str, int]]:
    return [{"up": relay.bytes_up, "down": relay.bytes_down} for relay in relays]


def payload_digests(run: dict[str, Any]) -> list[str]:
    """``round/client/digest`` of every payload, in order."""
    return [f"{u['server_round']}/{u['partition']}/{u['payload_digest']}" for u in run["uplinks"]]


def federate(output: Path, overrides: list[str], flwr_home: Path | None = None) -> dict[str, Any]:
    run_program("server.federate", ["--output", str(output), *overrides], flwr_home)
    content: dict[str, Any] = json.loads((output / "results.json").read_text())
    return content


COLUMNS = ("node", "payload", "polling up", "messages up", "wire up", "polling down", "wire down")
"""Of a node's bytes a round."""


def bytes_rows(results: dict[str, Any]) -> list[list[float]]:
    """One row a node, without its number: bytes a round, by what they are for."""
    payload = results["payload_bytes_per_client_round"]
    rows = []
    for wire in results["wire_bytes_per_client"]:
        polling, up, polling_down, down = (
            wire[way][what] / results["rounds"] for way in ("up", "down") for what in ("polling", "all")
        )
        rows.append([payload, polling, up - polling - payload, up, polling_down, down])
    return rows


def title_of(results: dict[str, Any]) -> str:
    return (
        f"{results['rounds']} rounds, {NUM_NODES} nodes, {results['seconds']:.0f} s over gRPC; bytes a node and round"
    )


def lead_of(results: dict[str, Any]) -> str:
    """What the demo is to show."""
    same = "the same payloads, to the bit" if results["payloads_equal"] else "DIFFERENT payloads"
    losses = results["heldout_loss"]
    return (
        f"gRPC and simulation sent {same}; held-out loss {losses['grpc'][0]:.4f} -> {losses['grpc'][-1]:.4f} over "
        f"gRPC, {losses['simulation'][-1]:.4f} in simulation"
    )


def sections_of(results: dict[str, Any]) -> list[Section]:
    """Of its page."""
    cells: list[list[Cell]] = [[node, *map(round, row)] for node, row in enumerate(bytes_rows(results))]
    losses = results["heldout_loss"]
    loss = "held-out loss, nats per token"
    rows: list[Row] = [
        {"round": number, loss: value, "back end": name} for name in losses for number, value in enumerate(losses[name])
    ]
    parts: list[Row] = [
        {"node": str(row[0]), "bytes a round, up": row[i], "what": COLUMNS[i]} for row in cells for i in (1, 2, 3)
    ]
    alt_loss = "Held-out loss after each round over gRPC and in simulation: one line hides the other if both agree."
    alt_bytes = "What a node sends a round: its payload, polling, and what else the messages take."
    digests = results["payload_digests"]
    pairs: list[list[Cell]] = [[*pair] for pair in zip(digests["grpc"], digests["simulation"], strict=False)]
    return [
        Section(
            "gRPC and simulation",
            [
                Facts({"the same payloads": results["payloads_equal"], "rounds": results["rounds"]}),
                Figure("Loss over rounds", alt_loss, charts.lines(rows, "round", loss, "back end"), rows),
            ],
        ),
        Section(
            "Bytes on the wire",
            [
                Figure("Up", alt_bytes, charts.bars(parts, "node", "bytes a round, up", "what"), parts),
                Table(title_of(results), COLUMNS, cells),
            ],
        ),
        Section("Payloads", [Table("Round/client/digest", ("over gRPC", "in simulation"), pairs)], closed=True),
    ]


def print_tables(results: dict[str, Any]) -> None:
    console = Console()
    table = ConsoleTable(title=title_of(results))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for node, row in enumerate(bytes_rows(results)):
        table.add_row(str(node), *(f"{size:,.0f}" for size in row))
    console.print(table)
    console.print(lead_of(results))


if __name__ == "__main__":
    main()
