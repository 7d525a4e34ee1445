"""The whole story on one machine: TGAP, then base, centralised, dense and coded, and a table to compare them.

    python -m bench.demo [--seeds 1] [--output outputs/demo] [key=value ...]

Every arm is the program that a user would start, as a process of its own. Further ``key=value`` go to all of them.
Writes results.json and report.html (self-contained) into the output folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.programs import kept_fraction, run_program
from bench.report_html import write_report
from conf.output import open_output, provenance, write_json

ARMS = ("base", "centralised", "dense", "coded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, starting at 0 (default 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every arm")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least one seed")
    try:
        output = open_output(args.output.absolute())
        start = time.monotonic()
        runs = [run_seed(seed, output / f"seed-{seed}", args.overrides) for seed in range(args.seeds)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    results = summary(runs) | {"seconds": time.monotonic() - start, "made_with": provenance()}
    write_json(results, output / "results.json")
    write_report(results, output / "report.html")
    print_tables(results)
    print(f"results: {output / 'results.json'}\nreport:  {output / 'report.html'}")


def run_seed(seed: int, output: Path, overrides: list[str]) -> dict[str, Any]:
    """TGAP and the four arms of one seed: their results by arm, and TGAP's report."""
    start = time.monotonic()
    codec = output / "codec"
    shown = Console(stderr=True)
    shown.rule(f"seed {seed}: TGAP records gradients on D1 and trains the codec")
    places = ["--output", str(output / "tgap"), "--artifact", str(codec)]
    run_program("tgap", [f"seed={seed}", *places, *overrides])
    run: dict[str, Any] = {
        "seed": seed,
        "tgap": json.loads((output / "tgap" / "report.json").read_text())["fidelity"],
        "tgap_seconds": time.monotonic() - start,
    }
    for arm in ARMS:
        shown.rule(f"seed {seed}: {arm}")
        place = output / arm
        own = [f"arm={arm}", f"seed={seed}", "--output", str(place), "--codec-artifact", str(codec)]
        run_program("server.federate", own + overrides)
        run[arm] = json.loads((place / "results.json").read_text())
    return run


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the single runs beside them."""
    arms = {
        arm: {
            "heldout_loss": [mean(losses) for losses in zip(*(run[arm]["heldout_loss"] for run in runs), strict=True)],
            "bits_per_parameter": mean(run[arm]["bits_per_parameter"] for run in runs),
            "uplink_payload_bytes_per_client_round": mean(
                run[arm]["uplink_payload_bytes_per_client_round"] for run in runs
            ),
            "seconds": mean(run[arm]["seconds"] for run in runs),
        }
        for arm in ARMS
    }
    kept = [kept_fraction(*(run[arm]["heldout_loss"][-1] for arm in ("base", "dense", "coded"))) for run in runs]
    singles = [
        {
            "seed": run["seed"],
            "kept_fraction": kept_one,
            "tgap_seconds": run["tgap_seconds"],
            "tgap_fidelity": run["tgap"],
            "arms": {
                arm: {key: run[arm][key] for key in (*arms[arm], "num_parameters", "uplink_payload_bytes")}
                for arm in ARMS
            },
        }
        for run, kept_one in zip(runs, kept, strict=True)
    ]
    return {
        "arms": arms,
        "kept_fraction": mean(kept),
        "dense_improvement": arms["base"]["heldout_loss"][-1] - arms["dense"]["heldout_loss"][-1],
        "seeds": [run["seed"] for run in runs],
        "runs": singles,
    }


def print_tables(results: dict[str, Any]) -> None:
    """Held-out loss by round, then what each arm costs and reaches, to standard output."""
    arms = results["arms"]
    rounds = len(arms["dense"]["heldout_loss"])
    shown = sorted({*range(0, rounds, max(1, (rounds - 1) // 4)), rounds - 1})
    console = Console(width=None if sys.stdout.isatty() else 100)
    seeds = ", ".join(map(str, results["seeds"]))
    losses = Table(title=f"held-out loss by round, nats per token (seed {seeds})")
    costs = Table(title="what each arm keeps of the dense improvement, and what a client sends")
    losses.add_column("arm")
    for number in shown:
        losses.add_column(str(number), justify="right")
    for column in ("arm", "loss", "kept", "bytes/client/round", "bits/param", "of fp32", "seconds"):
        costs.add_column(column, justify="left" if column == "arm" else "right")
    base, dense = arms["base"]["heldout_loss"][-1], arms["dense"]["heldout_loss"][-1]
    for name, arm in arms.items():
        loss = arm["heldout_loss"]
        losses.add_row(name, *(f"{loss[i]:.3f}" if i < len(loss) else "" for i in shown))
        bits, sent = arm["bits_per_parameter"], arm["uplink_payload_bytes_per_client_round"]
        kept = "" if name == "base" else f"{100 * (base - loss[-1]) / (base - dense):.1f} %"
        wire = [f"{sent:,.0f}", f"{bits:.3f}", f"1/{32 / bits:.0f}"] if sent else ["", "", ""]
        costs.add_row(name, f"{loss[-1]:.3f}", kept, *wire, f"{arm['seconds']:.0f}")
    console.print(losses)
    console.print(costs)
    singles = ", ".join(f"{100 * run['kept_fraction']:.1f} %" for run in results["runs"])
    console.print(
        f"coded keeps {100 * results['kept_fraction']:.1f} % of the dense improvement "
        f"({results['dense_improvement']:.3f} nat); by seed: {singles}. {results['seconds']:.0f} s in all."
    )


if __name__ == "__main__":
    main()
