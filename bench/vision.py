"""Full-model updates of a small convolutional network: accuracy and bytes, dense and coded with two codecs.

    python -m bench.vision [--seeds 3] [--bits 0.5,1,2,4] [--codecs learned,rotated] [--rounds 12] [--json OUT]

The app is ``examples/vision``: ten clients, whose shares of a label a Dirichlet distribution draws, on scikit-learn's
digits. Both ways get as many bits a parameter. Bytes are those of all records of all messages, as Flower counts them:
the network that every client is sent once, the batch norms' statistics, which travel exactly, and what says how it is
coded are among them. With ``--engine flwr`` each run is ``flwr run`` in Flower's simulation, in the environment of
``--python``; otherwise clients take turns in one process, which gives the same without the engine's start.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.flower_app import REPOSITORY, run_app, versions_in
from bench.local_app import run_app_here
from bench.programs import ends_in_a_line, spread_of
from conf.output import provenance, write_json

APP = REPOSITORY / "examples" / "vision"
NUM_CLIENTS = 10
_VERSIONS = ("flwr", "torch", "scikit-learn", "gradcodec")
Coding = tuple[str, float] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, starting at 0 (default 3)")
    parser.add_argument("--bits", default="0.5,1,2,4", help="a parameter, both ways")
    parser.add_argument("--codecs", default="learned,rotated")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--engine", choices=("here", "flwr"), default="here")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of those that need no engine")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="of the environment of --engine flwr")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if min(args.seeds, args.rounds, args.jobs) < 1:
        parser.error("--seeds, --rounds, --jobs: at least one")
    with ends_in_a_line(also=(OSError,)):
        codings = [None, *((codec, float(bits)) for codec in args.codecs.split(",") for bits in args.bits.split(","))]
        asked = [(seed, coding) for seed in range(args.seeds) for coding in codings]
        start = partial(run, rounds=args.rounds, python=args.python if args.engine == "flwr" else None)
        os.environ["OMP_NUM_THREADS"] = "1"  # runs beside each other
        with ProcessPoolExecutor(args.jobs if args.engine == "here" else 1, get_context("spawn")) as pool:
            runs = list(pool.map(start, *zip(*asked, strict=True)))
    rows = summary(runs)
    print_rows(rows, args.rounds, args.seeds)
    if args.json is not None:
        about: dict[str, Any] = {"clients": NUM_CLIENTS, "rounds": args.rounds, "engine": args.engine}
        about |= {"versions_of_the_app": versions_in(args.python, _VERSIONS), "made_with": provenance()}
        write_json({"rows": rows, "runs": runs, **about}, args.json)


def run(seed: int, coding: Coding, rounds: int, python: Path | None) -> dict[str, Any]:
    """One run; ``coding``: codec and bits, None: dense; ``python``: None, if no engine is used. Raises ValueError: it
    failed."""
    codec, bits = coding or ("dense", 32.0)
    given: dict[str, str | int | float | bool] = {
        "seed": seed,
        "num-server-rounds": rounds,
        "coded": coding is not None,
    }
    given |= {"codec": codec, "bits": bits}
    logging.getLogger("flwr").setLevel(logging.WARNING)
    found = run_app_here(APP, given, NUM_CLIENTS) if python is None else run_app(APP, given, NUM_CLIENTS, python)
    Console(stderr=True).print(f"seed {seed}, {codec} at {bits:g} bits: {found['accuracy'][-1]:.4f}")
    return {"seed": seed, "codec": codec, "bits": bits, **found}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a coding, over seeds; the dense run of the same seed beside it."""
    dense = {one["seed"]: one for one in runs if one["codec"] == "dense"}
    rows = []
    for codec, bits in dict.fromkeys((one["codec"], one["bits"]) for one in runs):
        mine = [one for one in runs if (one["codec"], one["bits"]) == (codec, bits)]
        final = [one["accuracy"][-1] for one in mine]
        behind = [dense[one["seed"]]["accuracy"][-1] - one["accuracy"][-1] for one in mine]
        total = [_total(one) / _total(dense[one["seed"]]) for one in mine]
        rows.append(
            {
                "codec": codec,
                "bits": bits,
                "bytes_up": mean(sum(one["bytes_up"]) for one in mine),
                "bytes_down": mean(sum(one["bytes_down"]) for one in mine),
                "bytes_down_of_round_1": mean(one["bytes_down"][0] for one in mine),
                "fraction_of_bytes": mean(total),
                "accuracy": mean(final),
                "accuracy_spread": spread_of(final),
                "behind_dense": mean(behind),
                "behind_dense_spread": spread_of(behind),
                "loss": mean(one["loss"][-1] for one in mine),
                "loss_spread": spread_of([one["loss"][-1] for one in mine]),
                "accuracy_by_round": [mean(values) for values in zip(*(one["accuracy"] for one in mine), strict=True)],
                "seconds": mean(one["seconds"] for one in mine),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]], rounds: int, seeds: int) -> None:
    title = f"{NUM_CLIENTS} clients, {rounds} rounds, {seeds} seeds; ± is the standard deviation over seeds"
    table = Table(title=title)
    for column in ("codec", "bits", "KB up", "KB down", "of dense's", "accuracy", "behind dense", "loss", "seconds"):
        table.add_column(column, no_wrap=True, justify="left" if column == "codec" else "right")
    for row in rows:
        table.add_row(
            row["codec"],
            f"{row['bits']:g}",
            f"{row['bytes_up'] / 1000:.0f}",
            f"{row['bytes_down'] / 1000:.0f}",
            f"1/{1 / row['fraction_of_bytes']:.1f}",
            f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_spread']:.1f} %",
            f"{100 * row['behind_dense']:+.1f} ± {100 * row['behind_dense_spread']:.1f}",
            f"{row['loss']:.4f} ± {row['loss_spread']:.4f}",
            f"{row['seconds']:.0f}",
        )
    Console(width=130 if not sys.stdout.isatty() else None).print(table)


def _total(one: dict[str, Any]) -> int:
    return int(sum(one["bytes_up"]) + sum(one["bytes_down"]))


if __name__ == "__main__":
    main()
