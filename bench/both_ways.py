"""What a whole run costs beside dense, every byte both ways counted: quality at equal rounds, bytes to dense's loss.

    python -m bench.both_ways [--seeds 3] [--budgets 0.5/0.5,0.25/0.25] [--times 2] [--json OUT] [key=value ...]

A budget is bits a parameter UP/DOWN, or UP/DOWN/CODEC (``learned`` where none is named). The coded runs go on for
``--times`` as many rounds as the dense one: what they kept at dense's rounds is read off on the way. Counted are
payloads and arrays up and down, catching up and snapshots, the final adapter for every client, and a copy of the
codec's artifact for each unless it is the one that ships with the project; for the dense run the adapter up and down,
and the final adapter for every client. What a run kept when it had used a share of dense's bytes, as if it had ended
there, stands in a second table. A bench that was stopped goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.arms import run_arm
from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, kept_fraction, spread_of
from conf.output import open_output, provenance, write_json
from strategies.outcomes import DOWNLINK_BYTES

BUDGETS = "0.5/0.5,0.25/0.25"
SHARES = (25, 40, 100, 200)
"""Byte budgets, as parts of what the dense run takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default 0)")
    parser.add_argument("--rounds", type=int, default=12, help="of the dense run (default 12)")
    parser.add_argument("--times", type=float, default=2.0, help="as many rounds for the coded runs (default 2)")
    parser.add_argument("--budgets", default=BUDGETS, help=f"UP/DOWN[/CODEC],... (default {BUDGETS})")
    parser.add_argument("--output", type=Path, default=Path("outputs/both-ways"))
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the figures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    if args.seeds < 1 or args.first_seed < 0 or args.rounds < 1 or args.times < 1:
        parser.error("at least one seed from 0 on, one round, and as many rounds as dense")
    with ends_in_a_line(TAKEN_UP_AGAIN):
        budgets = {text: budget_of(text) for text in args.budgets.split(",")}
        output = open_output(args.output.absolute())
        runs = []
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            runs.append(run_seed(seed, budgets, output / f"seed-{seed}", args))
    means = means_of(runs)
    print_means(means, args.rounds)
    if args.json is not None:
        about = {"rounds": args.rounds, "times": args.times, "settings": args.overrides}
        write_json({"runs": runs, "means": means, **about, "made_with": provenance()}, args.json)


def budget_of(text: str) -> list[str]:
    """What ``UP/DOWN[/CODEC]`` says, as settings. Raises ValueError: the text has another form."""
    up, *rest = text.split("/")
    if not 1 <= len(rest) <= 2:
        raise ValueError(f"--budgets holds {text!r}: UP/DOWN or UP/DOWN/CODEC is expected")
    return [f"codec={rest[1] if len(rest) == 2 else 'learned'}", f"codec.bits={up}", f"codec.down_bits={rest[0]}"]


def run_seed(seed: int, budgets: dict[str, list[str]], output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs of one seed. Raises ValueError: one failed."""
    own = [f"seed={seed}", *args.overrides]
    dense = run_arm("dense", output, ["arm=dense", *own, f"federation.rounds={args.rounds}"])
    longer = f"federation.rounds={round(args.times * args.rounds)}"
    judged = {}
    for text, settings in budgets.items():
        run = run_arm(text, output, ["arm=coded", *own, *settings, longer])
        judged[text] = judge(run, dense)
    return {
        "seed": seed,
        "dense": {"heldout_loss": dense["heldout_loss"], "bytes": dense["bytes"]},
        "coded": judged,
    }


def judge(run: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A coded run beside the dense one of its seed, from the results of both."""
    base, *losses = run["heldout_loss"]
    rounds, goal = len(dense["heldout_loss"]) - 1, dense["heldout_loss"][-1]
    reached = next((number for number, loss in enumerate(losses, 1) if loss <= goal), None)
    total = dense["bytes"]["total"]
    at_equal = bytes_until(run, rounds)
    at_goal = None if reached is None else bytes_until(run, reached)
    return {
        "heldout_loss": run["heldout_loss"],
        "kept": kept_fraction(base, goal, losses[rounds - 1]),
        "bytes": at_equal,
        "of_dense": total / at_equal["total"],
        "rounds_to_dense": reached,
        "bytes_to_dense": at_goal,
        "of_dense_at_its_loss": None if at_goal is None else total / at_goal["total"],
        "kept_within": {f"1/{share}": kept_within(run, dense, total / share) for share in SHARES},
        "kept_at_the_end": kept_fraction(base, goal, losses[-1]),
        "of_dense_at_the_end": total / run["bytes"]["total"],
        "seconds": run["seconds"],
    }


def kept_within(run: dict[str, Any], dense: dict[str, Any], budget: float) -> float:
    """Of dense's improvement, after as many rounds as fit into so many bytes; 0 if not even one does."""
    losses = run["heldout_loss"]
    rounds = max((n for n in range(1, len(losses)) if bytes_until(run, n)["total"] <= budget), default=0)
    return kept_fraction(losses[0], dense["heldout_loss"][-1], losses[rounds])


def bytes_until(run: dict[str, Any], rounds: int) -> dict[str, int]:
    """The account of a run's first rounds, as if it had ended there."""
    up = sum(one["payload_bytes"] for one in run["uplinks"] if one["server_round"] <= rounds)
    sent = [one for one in run["downlinks"] if one["server_round"] <= rounds]
    parts = {
        "up": up,
        "down": sum(one[size] for one in sent for size in DOWNLINK_BYTES),
        "delivery": run["delivery_bytes"][rounds - 1],
        "artifact": run["bytes"]["artifact"],
        "recording": run["bytes"].get("recording", 0),  # runs of before did not count it
    }
    beside = {"catch_up": "catch_up_bytes", "snapshots": "snapshot_bytes"}
    return {
        **parts,
        **{name: sum(one[size] for one in sent) for name, size in beside.items()},
        "total": sum(parts.values()),
    }


def means_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds; a figure that a seed lacks, since dense's loss was not reached, is null, with how many reached it."""
    found: dict[str, Any] = {}
    for text in runs[0]["coded"]:
        singles = [run["coded"][text] for run in runs]
        kept = [one["kept"] for one in singles]
        found[text] = {
            "kept": mean(kept),
            "kept_spread": spread_of(kept),
            "total_bytes": mean(one["bytes"]["total"] for one in singles),
            "kept_within": {
                share: mean(one["kept_within"][share] for one in singles) for share in singles[0]["kept_within"]
            },
            "reached": sum(one["rounds_to_dense"] is not None for one in singles),
            "seeds": len(singles),
            **{
                key: _mean(one[key] for one in singles)
                for key in (
                    "of_dense",
                    "rounds_to_dense",
                    "of_dense_at_its_loss",
                    "kept_at_the_end",
                    "of_dense_at_the_end",
                )
            },
        }
    return found


def _mean(values: Any) -> float | None:
    known = list(values)
    return None if None in known else mean(known)


def print_means(means: dict[str, Any], rounds: int) -> None:
    """One line a budget."""
    table = Table(title=f"both ways coded, everything counted, beside {rounds} rounds of dense")
    columns = (
        "up / down, bits",
        "kept",
        "+-",
        "of dense's bytes",
        "rounds to its loss",
        "of its bytes",
        "kept at the end",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for text, one in means.items():
        there = one["rounds_to_dense"]
        table.add_row(
            text,
            f"{100 * one['kept']:.1f} %",
            f"{100 * one['kept_spread']:.1f}",
            f"1/{one['of_dense']:.1f}",
            f"{one['reached']} of {one['seeds']} seeds" if there is None else f"{there:.1f}",
            "-" if there is None else f"1/{one['of_dense_at_its_loss']:.1f}",
            f"{100 * one['kept_at_the_end']:.1f} % at 1/{one['of_dense_at_the_end']:.1f}",
        )
    within = Table(title="kept within a part of dense's bytes")
    for column in ("up / down, bits", *(f"1/{share}" for share in SHARES)):
        within.add_column(column, justify="right")
    for text, one in means.items():
        within.add_row(text, *(f"{100 * kept:.1f} %" for kept in one["kept_within"].values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table, within)


if __name__ == "__main__":
    main()
