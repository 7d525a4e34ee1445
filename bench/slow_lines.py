"""A node on a slow line, with and without bits that follow what it measures of it (``--upload-seconds``).

    python -m bench.slow_lines [--kilobits 16] [--seconds 5] [--rounds 8] [--json OUT] [key=value ...]

Three nodes on hosts of their own (Linux network namespaces: needs root and iproute2), over gRPC with TLS and node keys;
what leaves the first one passes a token bucket of so many kilobits a second. The same federation twice, an adapter of
rank 32 at one bit a parameter, without the option and with it: how long rounds took, what each node sent, and the
held-out loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.deployment import deployment_on_hosts
from bench.namespaces import Namespaces
from bench.programs import ends_in_a_line, run_program
from conf.output import provenance, write_json

NUM_NODES = 3
COMMON = (
    *("backend=superlink", "lora.rank=32", "codec.bits=1.0", "codec.down_bits=0.5", "federation.sample_answers=0"),
    *(f"federation.num_clients={NUM_NODES}", f"federation.clients_per_round={NUM_NODES}", "train.steps=2"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilobits", type=int, default=16, help="a second, of the slow line (default 16)")
    parser.add_argument("--seconds", type=float, default=5.0, help="that a payload may take (default 5)")
    parser.add_argument("--rounds", type=int, default=8, help="of each run (default 8)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the figures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for both runs")
    args = parser.parse_intermixed_args()
    own = [*COMMON, f"federation.rounds={args.rounds}", *args.overrides]
    found: dict[str, Any] = {}
    with ends_in_a_line():
        for name, more in (("all alike", list[str]()), ("paced", ["--upload-seconds", str(args.seconds)])):
            with (
                tempfile.TemporaryDirectory(prefix="slow-lines-") as folder,
                Namespaces(NUM_NODES) as hosts,
                deployment_on_hosts(Path(folder) / "server", NUM_NODES, hosts, more) as place,
            ):
                hosts.slow(0, args.kilobits)
                output = Path(folder) / "run"
                run_program("server.federate", ["--output", str(output), *own], place.flwr_home, hosts.in_server([]))
                found[name] = figures_of(output)
    print_table(found)
    if args.json is not None:
        about = {"kilobits": args.kilobits, "upload_seconds": args.seconds, "settings": own}
        write_json({"runs": found, **about, "made_with": provenance()}, args.json)


def figures_of(output: Path) -> dict[str, Any]:
    results = json.loads((output / "results.json").read_text())
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events if event["event"] in ("nodes", "rehearsed", "round_finished")]
    times = times[-(len(results["heldout_loss"])) :]
    sent = {
        partition: [one["payload_bytes"] for one in results["uplinks"] if one["partition"] == partition]
        for partition in range(NUM_NODES)
    }
    return {
        "seconds_of_round": [later - earlier for earlier, later in pairwise(times)],
        "payload_bytes": sent,
        "heldout_loss": results["heldout_loss"],
        "faults": len(results["faults"]),
        "num_parameters": results["num_parameters"],
    }


def print_table(found: dict[str, Any]) -> None:
    table = Table(title="a node on a slow line")
    for column in ("run", "round", "seconds", *(f"node {i}, bytes" for i in range(NUM_NODES)), "loss"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, run in found.items():
        for i, seconds in enumerate(run["seconds_of_round"]):
            sent = [f"{sizes[i]:,}" if i < len(sizes) else "" for sizes in run["payload_bytes"].values()]
            table.add_row(
                name if not i else "", str(i + 1), f"{seconds:.1f}", *sent, f"{run['heldout_loss'][i + 1]:.4f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
