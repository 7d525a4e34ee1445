"""Runs of several arms side by side: the programs that a user would start, and what they reached, over seeds."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, kept_fraction, run_once
from conf.output import open_output, provenance, write_json

FIGURES = ("heldout_loss", "bits_per_parameter", "uplink_payload_bytes_per_client_round", "seconds")
"""Of a run's results, what is averaged over seeds."""


def parser_of(about: str | None, output: str, rounds: int) -> argparse.ArgumentParser:
    """Options that benches of whole runs over seeds have in common.

    Args:
        about: the bench's docstring.
        output: default folder of its runs.
        rounds: of every run, unless others are asked for.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default 3)")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"of every run (default {rounds})")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the figures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line; settings may stand anywhere in it. Ends the program where nothing would be run."""
    args = parser.parse_intermixed_args()
    if args.seeds < 1 or args.rounds < 1:
        parser.error("at least one seed and one round")
    return args


def folder_of(name: str) -> str:
    """Where an arm's run lies in the folder of its seed."""
    return re.sub(r"[^a-z0-9.]+", "-", name)


def run_arm(name: str, output: Path, settings: Sequence[str], *, anew: bool = False) -> dict[str, Any]:
    """One federated run or what it is compared with; its results, unless ``anew`` from disk if it was made before.

    Args:
        name: what it is called.
        output: folder of all runs of its seed.
        settings: ``arm`` among them.

    Raises:
        ValueError: it failed.
    """
    place = output / folder_of(name)
    own = ["--output", str(place), *settings]
    results: dict[str, Any] = run_once("server.federate", own, place / "results.json", anew=anew)
    return results


def over_seeds(
    args: argparse.Namespace,
    run_seed: Callable[[Path, list[str]], dict[str, dict[str, Any]]],
    mean_of: Callable[[Sequence[dict[str, Any]]], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """The means over seeds of every arm, by its name; saved with the single runs after every seed.

    Args:
        args: of ``parsed``.
        run_seed: a seed's folder and settings -> the figures of every arm, by its name.
        mean_of: one arm's figures, a seed each -> what is told of them.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    means: dict[str, dict[str, float]] = {}
    with ends_in_a_line(TAKEN_UP_AGAIN):
        for seed in range(args.seeds):
            output = open_output(args.output.absolute() / f"seed-{seed}")
            for name, figures in run_seed(output, [f"seed={seed}", f"federation.rounds={args.rounds}"]).items():
                runs.setdefault(name, []).append(figures)
            means = {name: mean_of(each) for name, each in runs.items()}
            if args.json is not None:
                about = {"rounds": args.rounds, "seeds": seed + 1, "settings": args.overrides}
                write_json({"runs": runs, "means": means, **about, "made_with": provenance()}, args.json)
    return means


def coding_share(run: dict[str, Any]) -> float:
    """The part of a client's work of all rounds, training included, that encoding and decoding its updates take."""
    coding = sum(one["seconds_encode"] + one["seconds_decode"] for one in run["uplinks"])
    training = sum(one["seconds_train"] for one in run["uplinks"])
    return float(coding / (coding + training)) if run["uplinks"] else 0.0


def summary(
    runs: Sequence[dict[str, Any]], arms: Sequence[str], beside: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Means over seeds, the single runs beside them.

    Args:
        runs: one a seed: its ``seed``, the results of every arm by its name, and whatever else is to be kept of it.
        arms: their names.
        beside: the ``runs`` of an earlier summary of the same arms and other seeds, to be put beside these.
    """
    singles = [*beside]
    for run in runs:
        kept = kept_fraction(*(run[arm]["heldout_loss"][-1] for arm in ("base", "dense", "coded")))
        of_arms = {
            arm: {key: run[arm][key] for key in (*FIGURES, "num_parameters", "uplink_payload_bytes", "bytes")}
            | {"coding_share": coding_share(run[arm])}
            for arm in arms
        }
        others = {key: value for key, value in run.items() if key not in arms}
        singles.append({**others, "kept_fraction": kept, "arms": of_arms})
    singles.sort(key=lambda single: single["seed"])
    means = {arm: _mean_of([single["arms"][arm] for single in singles]) for arm in arms}
    return {
        "arms": means,
        "kept_fraction": mean(single["kept_fraction"] for single in singles),
        "dense_improvement": means["base"]["heldout_loss"][-1] - means["dense"]["heldout_loss"][-1],
        "seeds": [single["seed"] for single in singles],
        "runs": singles,
    }


def _mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    losses = [mean(of_round) for of_round in zip(*(run["heldout_loss"] for run in runs), strict=True)]
    others = {key: mean(run[key] for run in runs) for key in (*FIGURES, "coding_share") if key != "heldout_loss"}
    counted = [run["bytes"] for run in runs if "bytes" in run]  # earlier results do not count them
    sizes = {key: mean(one[key] for one in counted) for key in counted[0]} if counted else {}
    return {"heldout_loss": losses, **others, "bytes": sizes}


def _beside(sizes: dict[str, float], dense: dict[str, float]) -> str:
    """The bytes of a whole run as a share of the dense run's; empty if they are not known or there are none."""
    if not sizes.get("total") or not dense.get("total"):
        return ""
    return f"1/{dense['total'] / sizes['total']:.1f}"


def print_tables(results: dict[str, Any]) -> None:
    """Held-out loss by round, then what each arm costs and reaches, to standard output."""
    arms = results["arms"]
    rounds = len(arms["dense"]["heldout_loss"])
    shown = sorted({*range(0, rounds, max(1, (rounds - 1) // 4)), rounds - 1})
    console = Console(width=None if sys.stdout.isatty() else 110)
    seeds = ", ".join(map(str, results["seeds"]))
    losses = Table(title=f"held-out loss by round, nats per token (seed {seeds})")
    costs = Table(title="what each arm keeps of the dense improvement, and what a client sends")
    losses.add_column("arm")
    for number in shown:
        losses.add_column(str(number), justify="right")
    for column in ("arm", "loss", "kept", "bytes/client/round", "bits/param", "of fp32", "in all", "coding", "seconds"):
        costs.add_column(column, justify="left" if column == "arm" else "right")
    base, dense = arms["base"]["heldout_loss"][-1], arms["dense"]["heldout_loss"][-1]
    for name, arm in arms.items():
        loss = arm["heldout_loss"]
        losses.add_row(name, *(f"{loss[i]:.3f}" if i < len(loss) else "" for i in shown))
        bits, sent = arm["bits_per_parameter"], arm["uplink_payload_bytes_per_client_round"]
        kept = "" if name == "base" else f"{100 * (base - loss[-1]) / (base - dense):.1f} %"
        wire = [f"{sent:,.0f}", f"{bits:.3f}", f"1/{32 / bits:.0f}"] if sent else ["", "", ""]
        wire += [_beside(arm.get("bytes", {}), arms["dense"].get("bytes", {}))]
        wire += [f"{100 * arm['coding_share']:.1f} %" if name.startswith("coded") else ""]
        costs.add_row(name, f"{loss[-1]:.3f}", kept, *wire, f"{arm['seconds']:.0f}")
    console.print(losses)
    console.print(costs)
    singles = ", ".join(f"{100 * run['kept_fraction']:.1f} %" for run in results["runs"])
    console.print(
        f"coded keeps {100 * results['kept_fraction']:.1f} % of the dense improvement "
        f"({results['dense_improvement']:.3f} nat); by seed: {singles}. {results['seconds']:.0f} s in all."
    )
