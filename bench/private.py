"""What differential privacy costs: held-out loss by epsilon, dense and coded, and from how many clients it is bearable.

    python -m bench.private [--seeds 3] [--rounds 6] [--epsilons 8,2,0.25] [--clients 100,1000,10000,100000]
        [--json OUT] [key=value ...]

Two tables. *Runs*: the embedded model's ten clients, five a round, record level and client level, beside the same
training without noise; every run is one that a user would start, dense and coded at half a bit. *By number of clients*:
client level with the noise in the sum (``privacy.noise=sum``), of which a mean over n clients has 1/n: a run of five
clients a round with as little noise as n clients would need, who would agree as much as those five. A simulation: so
many were not run. What it leaves out is that more clients' mean is itself less noisy. A run whose noise makes training
diverge is told as such. A bench that was stopped goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.arms import folder_of, parsed, parser_of, run_arm
from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, kept_fraction, spread_of
from conf.output import open_output, provenance, write_json
from privacy.accounting import noise_for

DELTA = 1e-5
A_ROUND = 5
ARMS = {"dense": ["arm=dense"], "coded": ["arm=coded", "codec.bits=0.5"]}
RECORD = ["train.batch_size=64", "train.steps=3", "train.lr=0.01"]
"""Few steps with many windows each: noise is added to each step's sum, however many windows are in it."""
CLIP = 4.5
"""About the norm of an update of the embedded model at the defaults, so that at client level little is cut."""


def main() -> None:
    parser = parser_of(__doc__, "outputs/private", rounds=6)
    parser.add_argument("--epsilons", default="8,2,0.25", help="budgets of a run (the paper's by default)")
    parser.add_argument("--clients", default="100,1000,10000,100000", help="of the simulated federations; none: ''")
    args = parsed(parser)
    epsilons = [float(text) for text in args.epsilons.split(",")]
    clients = [int(text) for text in args.clients.split(",") if text]
    with ends_in_a_line(TAKEN_UP_AGAIN):
        output = open_output(args.output.absolute())
        runs = all_runs(epsilons, clients, output, args)
    means = means_of(runs)
    print_means(means)
    if args.json is not None:
        about = {"rounds": args.rounds, "delta": DELTA, "settings": args.overrides}
        write_json({"runs": runs, "means": means, **about, "made_with": provenance()}, args.json)


def all_runs(
    epsilons: Sequence[float], clients: Sequence[int], output: Path, args: argparse.Namespace
) -> dict[str, list[list[float] | None]]:
    """Name -> held-out losses of every seed, None: it diverged. Simulated federations have the first seed alone."""
    found: dict[str, list[list[float] | None]] = {}
    for seed in range(args.seeds):
        own = [f"seed={seed}", "backend=inprocess", f"federation.rounds={args.rounds}", *args.overrides]
        wanted = real_runs(epsilons) | (simulated_runs(epsilons, clients, args.rounds) if seed == 0 else {})
        for name, settings in wanted.items():
            found.setdefault(name, []).append(losses_of(name, output / f"seed-{seed}", [*settings, *own]))
    return found


def losses_of(name: str, output: Path, settings: Sequence[str]) -> list[float] | None:
    """Before the first round and after each; None: the run ended by itself, since no client's training was finite, or
    its own held-out loss was none. Raises ValueError: it failed otherwise."""
    try:
        losses: list[float] = run_arm(name, output, settings)["heldout_loss"]
    except ValueError:
        events = output / folder_of(name) / "events.jsonl"
        last = json.loads(events.read_text(encoding="utf-8").splitlines()[-1]) if events.is_file() else {}
        if last.get("event") != "run_failed" or not re.search("diverged|usable replies", str(last.get("reason"))):
            raise
        return None
    return losses


def real_runs(epsilons: Sequence[float]) -> dict[str, list[str]]:
    """Name -> settings."""
    runs = {}
    for arm, settings in ARMS.items():
        for level, own in (("record", RECORD), ("client", [])):
            runs[f"{level} {arm} none"] = [*settings, *own]
            clip = 1.0 if level == "record" else CLIP
            for epsilon in epsilons:
                private = [f"privacy={level}_dp", f"privacy.epsilon={epsilon}", f"privacy.delta={DELTA}"]
                runs[f"{level} {arm} {epsilon:g}"] = [*settings, *own, *private, f"privacy.clip={clip}"]
    return runs


def simulated_runs(epsilons: Sequence[float], clients: Sequence[int], rounds: int) -> dict[str, list[str]]:
    """The same for federations of so many clients, all of them in every round."""
    runs = {}
    for arm, settings in ARMS.items():
        for epsilon in epsilons:
            needed = noise_for(epsilon, DELTA, rounds)
            for count in clients:
                noise = needed * math.sqrt(A_ROUND) / count  # the mean of five has it divided by the root of five
                private = ["privacy=client_dp", "privacy.epsilon=null", f"privacy.noise_multiplier={noise}"]
                runs[f"{count} clients {arm} {epsilon:g}"] = [*settings, *private, f"privacy.clip={CLIP}"]
    return runs


def means_of(runs: dict[str, list[list[float] | None]]) -> dict[str, Any]:
    """Name -> final loss, its spread over seeds, and the share of what the same training keeps without noise; None if
    one of the seeds diverged."""
    found: dict[str, Any] = {}
    for name, losses in runs.items():
        level, arm = ("client", name.split()[2]) if "clients" in name else (name.split()[0], name.split()[1])
        plain = runs[f"{level} {arm} none"]
        final = [one[-1] for one in losses if one is not None]
        if len(final) < len(losses):
            found[name] = {"heldout_loss": None, "diverged": len(losses) - len(final), "seeds": len(losses)}
            continue
        kept = [
            kept_fraction(one[0], one[-1], loss) for one, loss in zip(plain, final, strict=False) if one is not None
        ]
        found[name] = {
            "heldout_loss": mean(final),
            "spread": spread_of(final),
            "kept": mean(kept),
            "seeds": len(final),
        }
    return found


def print_means(means: dict[str, Any]) -> None:
    """One line a run."""
    table = Table(title="what differential privacy costs")
    for column in ("", "held-out loss", "+-", "kept of the same without noise"):
        table.add_column(column, justify="left" if not column else "right")
    for name, one in means.items():
        if one["heldout_loss"] is None:
            table.add_row(name, f"diverged in {one['diverged']} of {one['seeds']}", "", "")
            continue
        spread = f"{one['spread']:.4f}" if one["seeds"] > 1 else ""
        table.add_row(name, f"{one['heldout_loss']:.4f}", spread, f"{100 * one['kept']:.1f} %")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
