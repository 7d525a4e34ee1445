"""Does a search find what a grid finds? The fewest bytes that keep a loss: a grid of budgets, then Optuna.

    python -m bench.search [--grid 8] [--trials 10] [--keep 0.7] [--json OUT] [key=value ...]

Both are sweeps of ``python -m server.federate``, both ways coded with as many bits a parameter up as down. The loss to
keep is that of a dense run less a part of what it improves (``--keep``). The grid's points lie evenly on a log scale
between ``--least`` and ``--most`` bits; Optuna looks on the same scale and knows nothing of the grid
(``+search=fewest_bytes``, extra ``sweep``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arms import run_arm
from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, run_program
from conf.output import open_output, provenance, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, default=8, help="points of the grid (default 8)")
    parser.add_argument("--trials", type=int, default=10, help="of the search (default 10)")
    parser.add_argument("--least", type=float, default=0.05, help="bits a parameter (default 0.05)")
    parser.add_argument("--most", type=float, default=1.0, help="bits a parameter (default 1)")
    parser.add_argument("--keep", type=float, default=0.7, help="of dense's improvement (default 0.7)")
    parser.add_argument("--output", type=Path, default=Path("outputs/search"))
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the figures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    if args.grid < 2 or args.trials < 1 or not 0 < args.least < args.most <= 64 or not 0 < args.keep <= 1:
        parser.error("at least two points and one trial, 0 < --least < --most <= 64, and --keep in (0, 1]")
    with ends_in_a_line(TAKEN_UP_AGAIN):
        found = searched(open_output(args.output.absolute()), args)
    print_found(found)
    if args.json is not None:
        write_json({**found, "settings": args.overrides, "made_with": provenance()}, args.json)


def searched(output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs. Raises ValueError: one failed."""
    dense = run_arm("dense", output, ["arm=dense", *args.overrides])
    base, reached = dense["heldout_loss"][0], dense["heldout_loss"][-1]
    target = base - args.keep * (base - reached)
    points = ",".join(f"{bits:.4g}" for bits in spread(args.least, args.most, args.grid))
    both = f"search.target_loss={target:.6f}"
    grid = sweep(output / "grid", [*args.overrides, both, f"codec.bits={points}", "codec.down_bits=${codec.bits}"])
    scale = f"codec.bits=tag(log, interval({args.least}, {args.most}))"
    trials = f"hydra.sweeper.n_trials={args.trials}"
    search = sweep(output / "search", ["+search=fewest_bytes", *args.overrides, both, scale, trials])
    best, other = best_of(grid, "grid"), best_of(search, "search")
    return {
        "dense": {"base_loss": base, "heldout_loss": reached, "bytes": dense["bytes"]["total"]},
        "target_loss": target,
        "grid": grid,
        "search": search,
        "best_of_grid": best,
        "best_of_search": other,
        "search_over_grid": other["total_bytes"] / best["total_bytes"],
    }


def spread(least: float, most: float, count: int) -> list[float]:
    """So many points from one to the other, each as many times the one before."""
    return [least * (most / least) ** (i / (count - 1)) for i in range(count)]


def sweep(folder: Path, settings: Sequence[str]) -> list[dict[str, Any]]:
    """What became of its jobs. Raises ValueError: one failed."""
    run_program("server.federate", ["-m", "--output", str(folder), *settings])
    jobs = json.loads((folder / "summary.json").read_text())["jobs"]
    keys = (
        "number",
        "differs",
        "heldout_loss",
        "target_loss",
        "total_bytes",
        "bits_per_parameter",
        "seconds",
        "pareto",
    )
    return [{key: job[key] for key in keys} for job in jobs]


def best_of(jobs: Sequence[dict[str, Any]], what: str) -> dict[str, Any]:
    """The fewest bytes among those that kept the loss. Raises ValueError: none did."""
    kept = [job for job in jobs if job["heldout_loss"] <= job["target_loss"]]
    if not kept:
        raise ValueError(f"no run of the {what} kept the loss: choose a lower --keep, or more --most")
    return min(kept, key=lambda job: int(job["total_bytes"]))


def print_found(found: dict[str, Any]) -> None:
    print(f"loss to keep: {found['target_loss']:.4f} (dense {found['dense']['heldout_loss']:.4f})")
    for what in ("grid", "search"):
        best = found[f"best_of_{what}"]
        runs = f"{len(found[what])} runs"
        print(f"{what:>6}, {runs}: {best['differs']}, {best['total_bytes']:,} bytes, loss {best['heldout_loss']:.4f}")
    print(f"the search's bytes are {found['search_over_grid']:.2f} of the grid's best")


if __name__ == "__main__":
    main()
