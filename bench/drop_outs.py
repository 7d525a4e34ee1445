"""Secure aggregation over gRPC while nodes are killed: at each step of the protocol, a share of them at once.

    python -m bench.drop_outs [--nodes 10] [--gone 3] [--json OUT] [key=value ...]

A real deployment on loopback (gRPC, TLS, node keys) carries one run a step, and some of its nodes are killed with all
that they started (`kill -9`), in round 1: once their keys are known and before anybody is invited; after the invitation
and before they have answered; after their masked message is with the server and before the sum is opened. Round 2 goes
on with those that are left. Judged beside an undisturbed run: with all messages in the sum its loss must be the same to
the bit, as masks that did not come off to the last integer would leave noise; with fewer it must be near.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.deployment import Deployment, deployment
from bench.programs import ends_in_a_line
from conf.output import provenance, write_json

STEPS = ("none", "before the invitation", "before the reply", "before the opening")
SMALL = (
    "federation.rounds=2",
    "run_id=drop-outs",  # the same dithers in all runs
    "federation.round_seconds=180",
    "federation.wait_seconds=120",
    "federation.min_clients=1",
    "privacy.secure_aggregation=true",
    "codec.bits=1",
    "train.steps=4",
    "task.window=64",
    "task.max_windows=100",
    "task.heldout_windows=4",
)
NEAR = 0.25
"""Of the improvement: so far a round's loss may lie from the undisturbed one's with other clients in it."""
_ARRIVES_SECONDS = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--gone", type=int, default=3, help="how many of them are killed at each step (default 3)")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    if not 0 < args.gone <= args.nodes - 3:
        parser.error("--gone: at least one, and three nodes stay")
    with ends_in_a_line(), tempfile.TemporaryDirectory(prefix="drop-outs-") as folder:
        found = drop_outs(Path(folder), args.nodes, args.gone, args.overrides)
    print_table(found)
    if args.json is not None:
        about = {"nodes": args.nodes, "gone": args.gone, "settings": args.overrides}
        write_json({"steps": found, **about, "made_with": provenance()}, args.json)
    if not all(one["survived"] for one in found.values()):
        sys.exit(1)


def drop_outs(
    folder: Path, nodes: int, gone: int, overrides: Sequence[str] = (), steps: Sequence[str] = STEPS
) -> dict[str, dict[str, Any]]:
    """Step, "none" first -> what became of the run. Raises ValueError: the deployment does not start."""
    found: dict[str, dict[str, Any]] = {}
    sizes = [f"federation.num_clients={nodes}", f"federation.clients_per_round={nodes}"]
    victims = range(nodes - gone, nodes)
    for step in steps:
        with deployment(folder / step.replace(" ", "-"), nodes) as running:
            run = Run(running, [*SMALL, *sizes, *overrides])
            try:
                _KILLS[step](running, run, victims)
                results = run.results()
            finally:
                run.process.kill()
        found[step] = judged(step, results, found.get("none"), gone)
        print(f"{step}: {found[step]}", file=sys.stderr)
    return found


def judged(step: str, results: dict[str, Any], undisturbed: dict[str, Any] | None, gone: int) -> dict[str, Any]:
    """What a run came to, and whether that is what it should."""
    losses = results["heldout_loss"]
    in_rounds = [sum(one["server_round"] == r for one in results["uplinks"]) for r in (1, 2)]
    kept: dict[str, Any] = {"heldout_loss": losses, "in_sums": in_rounds, "seconds": results["seconds"]}
    if undisturbed is None:
        return {**kept, "survived": losses[-1] < losses[0]}
    true, all_in = undisturbed["heldout_loss"], undisturbed["in_sums"][0]
    first = all_in if step == "before the opening" else all_in - gone
    near = abs(losses[1] - true[1]) <= NEAR * abs(true[0] - true[1])
    right = losses[1] == true[1] if first == all_in else near
    goes_on = len(losses) == 3 and losses[2] < losses[0]
    return {**kept, "survived": bool(right and goes_on and in_rounds == [first, all_in - gone])}


class Run:
    """``python -m server.federate`` on a deployment, as a process of its own."""

    def __init__(self, running: Deployment, overrides: Sequence[str]) -> None:
        self.output = running.folder / "run"
        self.output.mkdir()
        where = ["backend=superlink", f"hydra.run.dir={self.output}", f"output={self.output}"]
        with (self.output / "run.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.federate", *where, *overrides],
                env={**os.environ, "FLWR_HOME": str(running.flwr_home)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, event: str) -> None:
        """Raises ValueError: the run ended before it, or it never came."""
        path = self.output / "events.jsonl"

        def came() -> bool:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            return any(json.loads(line)["event"] == event for line in lines)

        self.until(came, f"no {event}")

    def results(self) -> dict[str, Any]:
        """Raises ValueError: it failed."""
        self.until(lambda: self.process.poll() is not None, "it did not end")
        if self.process.returncode:
            raise ValueError(self._tail("it failed"))
        found: dict[str, Any] = json.loads((self.output / "results.json").read_text(encoding="utf-8"))
        return found

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 900) -> None:
        """Waits. Raises ValueError: the run ended before, or it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self.process.poll() is not None and not condition()):
                raise ValueError(self._tail(what))
            time.sleep(0.1)

    def _tail(self, what: str) -> str:
        return f"{what}; its log ends with {(self.output / 'run.log').read_text(errors='replace')[-1500:]}"


def _nobody(running: Deployment, run: Run, victims: Sequence[int]) -> None:
    """An undisturbed run."""


def _before_the_invitation(running: Deployment, run: Run, victims: Sequence[int]) -> None:
    run.wait_for("nodes")
    _kill(running, victims)


def _before_the_reply(running: Deployment, run: Run, victims: Sequence[int]) -> None:
    for victim in victims:  # so that none is quicker than the kill
        _trainer(running, victim).suspend()
    run.wait_for("round_started")
    time.sleep(_ARRIVES_SECONDS)
    _kill(running, victims)


def _before_the_opening(running: Deployment, run: Run, victims: Sequence[int]) -> None:
    """One node that stays is held up until the victims' messages are with the server."""
    run.wait_for("nodes")
    slow = _trainer(running, 0)
    slow.suspend()
    try:
        for victim in victims:
            run.until(partial(_has_masked, running, victim), f"node {victim} never masked")
        time.sleep(_ARRIVES_SECONDS)
        _kill(running, victims)
    finally:
        slow.resume()


_KILLS = dict(zip(STEPS, (_nobody, _before_the_invitation, _before_the_reply, _before_the_opening), strict=True))


def _kill(running: Deployment, victims: Sequence[int]) -> None:
    for victim in victims:
        os.killpg(running.nodes[victim].pid, signal.SIGKILL)


def _has_masked(running: Deployment, partition: int) -> bool:
    """Whether the node has noted that it masks a message, which it does right before."""
    return any((running.folder / f"memory-{partition}").glob(f"*/sum-{partition}.json"))


def _trainer(running: Deployment, partition: int) -> psutil.Process:
    """The process that trains. Raises ValueError: there is none."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for process in psutil.Process(running.nodes[partition].pid).children(recursive=True):
            if "client.resident" in process.cmdline():
                return process
        time.sleep(0.1)
    raise ValueError(f"node {partition} has no trainer")


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """One line a step."""
    table = Table(title="nodes killed while sums are made")
    for column in ("killed", "in the sums", "held-out loss", "seconds", ""):
        table.add_column(column)
    for step, one in found.items():
        losses = " ".join("-" if not math.isfinite(loss) else f"{loss:.4f}" for loss in one["heldout_loss"])
        said = "survived" if one["survived"] else "NOT SURVIVED"
        table.add_row(step, " ".join(map(str, one["in_sums"])), losses, f"{one['seconds']:.0f}", said)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
