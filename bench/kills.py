"""Random `kill -9` over a deployment's server and clients: what is left of the runs beside an undisturbed one.

    python -m bench.kills [--kills 200] [--minutes M] [--deployments 2] [--seed 0] [--json OUT] [key=value ...]

Real deployments on loopback (gRPC, TLS, node keys, two nodes) carry one run after the other, and any of their
processes is killed at random moments: SuperLink, executor, server app, SuperNodes, trainers, the processes of single
messages, and the programs that a user started. What a user started is started again, as an init system would; a run
that ended is gone on with by ``resume=latest``. Every run must end with the held-out losses of the undisturbed one, to
the bit; a round counts when all its clients answered (``federation.min_replies``), so that a lost reply costs a try,
not a client's share.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.deployment import Deployment, deployment
from bench.programs import ends_in_a_line
from conf import CHECKOUT
from conf.output import provenance, write_json

NUM_NODES = 2
SMALL = (
    "federation.rounds=4",
    f"federation.num_clients={NUM_NODES}",
    f"federation.clients_per_round={NUM_NODES}",
    f"federation.min_replies={NUM_NODES}",
    "federation.retries=20",
    "federation.max_failures=100",
    "federation.round_seconds=120",
    "train.steps=6",
    "task.window=64",
    "task.max_windows=100",
    "task.heldout_windows=4",
)
KINDS = {
    "server.host.control": "SuperLink",
    "flower-superexec": "server's executor",
    "flwr-serverapp": "server app",
    "client.supernode": "SuperNode",
    "client.executor": "node's executor",
    "client.own_app": "client app",
    "client.resident": "trainer",
}
"""A word of the command line -> what the process is."""
MOST_KILLS_A_RUN = 8
LONGEST_PAUSE = 30.0
RUN_SECONDS = 900.0


@dataclass
class Tally:
    """What was killed and what became of the runs."""

    killed: Counter[str] = field(default_factory=Counter)
    in_round: Counter[int] = field(default_factory=Counter)  # how many kills; 0: before the first
    runs: int = 0
    resumed: int = 0
    begun_anew: int = 0  # runs that ended before their first round was kept
    different: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.killed + other.killed,
            self.in_round + other.in_round,
            self.runs + other.runs,
            self.resumed + other.resumed,
            self.begun_anew + other.begun_anew,
            self.different + other.different,
            self.unfinished + other.unfinished,
        )


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all (default 200)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further run after so long")
    parser.add_argument("--deployments", type=int, default=2, help="side by side; most of their time is waiting")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    share = -(-args.kills // args.deployments)
    with (
        ends_in_a_line(),
        tempfile.TemporaryDirectory(prefix="kills-") as folder,
        ThreadPoolExecutor(args.deployments) as pool,
    ):
        kill = partial(kill_for_a_while, num_kills=share, deadline=deadline, overrides=args.overrides)
        draws = [random.Random(f"{args.seed}/{number}") for number in range(args.deployments)]
        work = [pool.submit(kill, Path(folder) / str(number), draw) for number, draw in enumerate(draws)]
        tally = sum((one.result() for one in work), Tally())
    print_tally(tally)
    if args.json is not None:
        figures = {
            **vars(tally),
            "killed": dict(tally.killed),
            "in_round": dict(sorted(tally.in_round.items())),
            "seconds": time.monotonic() - started,
            "seed": args.seed,
            "overrides": args.overrides,
        }
        write_json({**figures, "made_with": provenance()}, args.json)
    if tally.different or tally.unfinished:
        sys.exit(1)


def kill_for_a_while(
    folder: Path, draw: random.Random, num_kills: int, deadline: float, overrides: Sequence[str] = ()
) -> Tally:
    """One deployment, and runs on it until so many processes were killed or the time is over."""
    tally = Tally()
    with deployment(folder / "deploy", NUM_NODES) as running:
        expected = run_to_the_end(running, folder / "undisturbed", lambda: None, tally, overrides)
        while tally.killed.total() < num_kills and time.monotonic() < deadline:
            left = min(MOST_KILLS_A_RUN, num_kills - tally.killed.total())
            output = folder / f"run-{tally.runs}"
            kills = Kills(running, output, tally, draw, left)
            losses = run_to_the_end(running, output, kills.maybe, tally, overrides)
            tally.runs += 1
            if not losses:
                tally.unfinished.append(tail(output / "run.log"))
            elif losses != expected:
                tally.different.append(f"{losses} beside {expected}: {kills.done}")
            print(f"{folder.name}: {kills.done} -> {'same' if losses == expected else losses}", file=sys.stderr)
    return tally


@dataclass
class Kills:
    """Kills now and then, while a run goes on."""

    running: Deployment
    output: Path
    tally: Tally
    draw: random.Random
    left: int
    done: list[str] = field(default_factory=list)
    _next: float = 0.0

    def maybe(self) -> None:
        """Kills one process if its time has come; starts again what a user had started."""
        now = time.monotonic()
        if self._next == 0.0:
            self._next = now + self.draw.uniform(0, LONGEST_PAUSE)
        if self.left and now >= self._next and (victim := self._victim()) is not None:
            kind, process = victim
            try:
                process.kill()  # its parent may never ask for its end, so nobody waits for it here
            except psutil.NoSuchProcess:
                return
            self.left -= 1
            server_round = round_of(self.output)
            self.tally.killed[kind] += 1
            self.tally.in_round[server_round] += 1
            self.done.append(f"{kind} in round {server_round}")
            self._next = time.monotonic() + self.draw.uniform(0, LONGEST_PAUSE)
        if self.done:
            self.running.start_again()

    def _victim(self) -> tuple[str, psutil.Process] | None:
        """A kind first, then a process: there are more of some than of others."""
        found: dict[str, list[psutil.Process]] = {}
        for name, root in (("server program", self.running.server), *(("node program", n) for n in self.running.nodes)):
            if root.poll() is not None:  # gone, and not started again yet
                continue
            program = psutil.Process(root.pid)
            found.setdefault(name, []).append(program)
            for process in program.children(recursive=True):
                if kind := kind_of(process):
                    found.setdefault(kind, []).append(process)
        if not found:
            return None
        kind = self.draw.choice(sorted(found))
        return kind, self.draw.choice(found[kind])


def round_of(output: Path) -> int:
    """The round that the run is in, by its event log; 0: none has begun."""
    log = output / "events.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return max((entry.get("server_round", 0) for entry in map(json.loads, lines)), default=0)


def kind_of(process: psutil.Process) -> str:
    """What the process is; nothing for those that are none of ours or have ended, whose command line is empty."""
    try:
        words = " ".join(process.cmdline())
    except psutil.Error:
        return ""
    return next((kind for word, kind in KINDS.items() if word in words), "")


def run_to_the_end(
    running: Deployment, output: Path, now_and_then: Callable[[], None], tally: Tally, own_settings: Sequence[str] = ()
) -> list[float]:
    """A federated run, resumed for as long as it takes; its held-out losses, or none if it never ended well."""
    deadline = time.monotonic() + RUN_SECONDS
    overrides = [*SMALL, *own_settings, f"output={output}"]
    output.mkdir(parents=True)
    own = {"FLWR_HOME": str(running.flwr_home), "PYTHONPATH": str(CHECKOUT)}
    while time.monotonic() < deadline:
        with (output / "run.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "server.federate", "backend=superlink", f"hydra.run.dir={output}", *overrides],
                env={**os.environ, **own},
                cwd=output.parent,  # whose latest run it is
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        while process.poll() is None and time.monotonic() < deadline:
            now_and_then()
            time.sleep(0.1)
        if process.poll() == 0:
            losses: list[float] = json.loads((output / "results.json").read_text())["heldout_loss"]
            return losses
        process.kill()
        if (output / "checkpoint.safetensors").is_file():
            tally.resumed += 1
            overrides = ["resume=latest"]
        else:
            tally.begun_anew += 1
        time.sleep(2)
    return []


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:] if log.is_file() else ""


def print_tally(tally: Tally) -> None:
    """How often what was killed, and what became of the runs."""
    table = Table(title=f"{tally.killed.total()} processes killed over {tally.runs} runs", show_header=False)
    rows: dict[str, Any] = {**dict(sorted(tally.killed.items())), "gone on with by resume": tally.resumed}
    rows |= {"begun anew": tally.begun_anew}
    rows |= {f"kills in round {number}": count for number, count in sorted(tally.in_round.items())}
    rows |= {"runs with other losses": len(tally.different), "runs that never ended": len(tally.unfinished)}
    for name, count in rows.items():
        table.add_row(name, str(count))
    Console().print(table)
    for text in (*tally.different, *tally.unfinished):
        print(text)


if __name__ == "__main__":
    main()
