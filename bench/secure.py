"""What secure aggregation costs: bytes, loss and seconds with and without it, in one table.

    python -m bench.secure [--seeds 3] [--open 0.1,0.25,0.5] [--masked 0.5,1,2] [--json OUT] [key=value ...]

Ten clients, all of them in every round. Open runs send codes of so many bits a parameter, of which the server sees
every client's; masked ones send as many bits of masked integers and what the protocol adds, of which it sees the sum.
Bytes are those of the uplink, the protocol's with them, and of all that goes down. The last column compares at equal
loss: the bytes up of a masked run over those that an open one takes for the same final loss, read off between the open
runs. A bench that was stopped goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.arms import parsed, parser_of, run_arm
from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, kept_fraction, spread_of
from conf.output import open_output, provenance, write_json

CLIENTS = 10


def main() -> None:
    parser = parser_of(__doc__, "outputs/secure", rounds=12)
    parser.add_argument("--open", default="0.1,0.25,0.5", help="bits a parameter of the open runs")
    parser.add_argument("--masked", default="0.5,1,2", help="of the masked ones, BITS or BITS/LEVELS")
    args = parsed(parser)
    arms = arms_of(args.open.split(","), args.masked.split(","))
    with ends_in_a_line(TAKEN_UP_AGAIN):
        output = open_output(args.output.absolute())
        runs = [run_seed(seed, arms, output / f"seed-{seed}", args) for seed in range(args.seeds)]
    means = means_of(runs)
    print_means(means)
    if args.json is not None:
        about = {"rounds": args.rounds, "clients": CLIENTS, "settings": args.overrides}
        write_json({"runs": runs, "means": means, **about, "made_with": provenance()}, args.json)


def arms_of(open_bits: Sequence[str], masked: Sequence[str]) -> dict[str, list[str]]:
    """Name -> settings."""
    arms = {"dense": ["arm=dense"]}
    arms |= {f"open {bits}": ["arm=coded", f"codec.bits={bits}"] for bits in open_bits}
    for text in masked:
        bits, _, levels = text.partition("/")
        own = ["arm=coded", f"codec.bits={bits}", "privacy.secure_aggregation=true"]
        arms[f"masked {text}"] = own + ([f"privacy.levels={levels}"] if levels else [])
    return arms


def run_seed(seed: int, arms: dict[str, list[str]], output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs of one seed, by name. Raises ValueError: one failed."""
    own = [
        f"seed={seed}",
        "backend=inprocess",
        f"federation.rounds={args.rounds}",
        f"federation.num_clients={CLIENTS}",
        f"federation.clients_per_round={CLIENTS}",
        *args.overrides,
    ]
    found = {}
    for name, settings in arms.items():
        run = run_arm(name, output, [*settings, *own])
        found[name] = {
            "heldout_loss": run["heldout_loss"],
            "up": run["bytes"]["up"] / len(run["uplinks"]),
            "down": run["bytes"]["down"] / len(run["uplinks"]),
            "seconds": run["seconds"],
        }
    return {"seed": seed, "arms": found}


def means_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over seeds: final loss and its spread, the share of dense's improvement, bytes a client and round."""
    found: dict[str, Any] = {}
    for name in runs[0]["arms"]:
        singles = [run["arms"][name] for run in runs]
        losses = [one["heldout_loss"][-1] for one in singles]
        dense = [run["arms"]["dense"]["heldout_loss"] for run in runs]
        kept = [kept_fraction(one[0], one[-1], loss) for one, loss in zip(dense, losses, strict=True)]
        found[name] = {
            "heldout_loss": mean(losses),
            "spread": spread_of(losses),
            "kept": mean(kept),
            **{key: mean(one[key] for one in singles) for key in ("up", "down", "seconds")},
        }
    points = sorted((one["heldout_loss"], one["up"]) for name, one in found.items() if not name.startswith("masked"))
    for name, one in found.items():
        if name.startswith("masked"):
            needed = bytes_for(one["heldout_loss"], points)
            one["over_open"] = None if needed is None else one["up"] / needed
    return found


def bytes_for(loss: float, points: Sequence[tuple[float, float]]) -> float | None:
    """Bytes that an open run takes for a loss, between runs straight in their logarithm; None: beyond all of them.

    Args:
        points: loss and bytes of runs, ascending by loss.
    """
    for (better, dear), (worse, cheap) in itertools.pairwise(points):
        if better <= loss <= worse:
            share = (loss - better) / (worse - better) if worse > better else 0.0
            return math.exp((1 - share) * math.log(dear) + share * math.log(cheap))
    return None


def print_means(means: dict[str, Any]) -> None:
    """One line an arm."""
    table = Table(title=f"{CLIENTS} clients, with and without secure aggregation")
    for column in ("", "held-out loss", "+-", "kept", "bytes up", "bytes down", "seconds", "of open's bytes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, one in means.items():
        over = one.get("over_open")
        table.add_row(
            name,
            f"{one['heldout_loss']:.4f}",
            f"{one['spread']:.4f}",
            f"{100 * one['kept']:.1f} %",
            f"{one['up']:,.0f}",
            f"{one['down']:,.0f}",
            f"{one['seconds']:.0f}",
            "" if over is None else f"{over:.1f} times",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
