"""Many simulated clients in one run: clients a second, and the server's peak memory by number of clients.

    python -m bench.many_clients [--clients 20,200] [--rounds 2] [--json OUT] [key=value ...]

Every client takes part in every round, with one light training step on the embedded model, so that the run is the
engine's and the server's work. Memory is that of the process that runs the server, without Ray's actors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.programs import ends_in_a_line
from conf.output import provenance, write_json

LIGHT = ["train.steps=1", "train.batch_size=1", "train.micro_batch_size=1", "task.window=32", "task.max_windows=32"]
LIGHT += ["task.heldout_windows=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="20,200", help="how many, one run each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    with ends_in_a_line():
        counts = [int(count) for count in args.clients.split(",")]
        rows = [measure(count, args.rounds, args.overrides) for count in counts]
    table = Table(title=f"simulation, every client in each of {args.rounds} rounds")
    for column in ("clients", "replies", "faults", "seconds", "clients/s", "server's peak MB"):
        table.add_column(column, justify="right")
    for row in rows:
        whole = [str(row[key]) for key in ("clients", "replies", "faults")]
        table.add_row(*whole, *(f"{row[key]:.1f}" for key in ("seconds", "clients_per_s", "peak_mb")))
    Console().print(table)
    if args.json is not None:
        write_json({"rows": rows, "rounds": args.rounds, "made_with": provenance()}, args.json)


def measure(num_clients: int, num_rounds: int, overrides: list[str]) -> dict[str, Any]:
    """One run. Raises ValueError: it failed."""
    with tempfile.TemporaryDirectory(prefix="bench-many-") as output:
        own = [f"federation.num_clients={num_clients}", f"federation.clients_per_round={num_clients}"]
        own += [f"federation.rounds={num_rounds}", f"output={output}", f"hydra.run.dir={output}"]
        process = subprocess.Popen([sys.executable, "-m", "server.federate", *LIGHT, *own, *overrides])
        peak = _Peak(process.pid)
        status = process.wait()
        peak.join()
        if status != 0:
            raise ValueError("`python -m server.federate` failed; the reason stands above")
        results = json.loads((Path(output) / "results.json").read_text())
    return {
        "clients": num_clients,
        "replies": len(results["uplinks"]),
        "faults": len(results["faults"]),
        "seconds": results["seconds"],
        "clients_per_s": len(results["uplinks"]) / results["seconds"],
        "peak_mb": peak.num_bytes / 1e6,
    }


class _Peak(threading.Thread):
    """The most memory that a process held while it lived."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.num_bytes = 0
        self._process = psutil.Process(pid)
        self.start()

    def run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while self._process.status() != psutil.STATUS_ZOMBIE:
                self.num_bytes = max(self.num_bytes, self._process.memory_info().rss)
                time.sleep(0.2)


if __name__ == "__main__":
    main()
