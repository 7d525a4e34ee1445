"""Held-out loss over bytes: federated runs of every codec, over seeds, beside the dense run of the same seed.

    python -m bench.loss_over_bytes [--seeds 3] [--runs learned@0.5,topk@0.5,...] [--output DIR] [key=value ...]

A run is ``CODEC[@BITS][:key=value[:key=value]]``; seeds, data and client samples are equal in all runs of a seed. The
artifact of ``learned`` is made by TGAP on D1 of the same seed. Every run is the program that a user would start, as a
process of its own. A bench that was stopped goes on where it was: finished runs with equal settings are not run again.

For every run: real payload bytes, the final loss with its spread, the difference to dense on the same seed, the share
of the dense improvement that is kept, and the bytes that one client sent until 80, 90, 95 and 99 % of it were reached
(a round counts as every client's, whether or not it was picked).
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, kept_fraction, run_once, spread_of
from conf.output import open_output, provenance, write_json

SHARES = (0.8, 0.9, 0.95, 0.99)
RATES = ("0.05", "0.1", "0.25", "0.5", "1")
PEERS = ("rotated", "powersgd", "topk", "eden", "b-only")
DEFAULT_RUNS = [
    *(f"learned@{rate}" for rate in RATES),
    *(f"{name}@{rate}" for name in PEERS for rate in ("0.1", "0.5", "1")),
    *("sign", "nf4", "int8", "bf16"),
]


@dataclass(frozen=True)
class Run:
    """What ``CODEC[@BITS][:key=value...]`` says."""

    name: str
    overrides: tuple[str, ...]
    needs_artifact: bool

    @classmethod
    def of(cls, text: str) -> Run:
        """Raises ValueError: the text has another form."""
        head, *own = text.split(":")
        codec, at, bits = head.partition("@")
        if not codec or (at and not _is_number(bits)) or any("=" not in item for item in own):
            raise ValueError(f"--runs holds {text!r}: CODEC[@BITS][:key=value...] is expected")
        rate = [f"codec.bits={bits}"] if at else []
        freeze = ["lora.train=b"] if codec == "b-only" else []
        return cls(text, (f"codec={codec}", *rate, *freeze, *own), codec == "learned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, starting at 0 (default 3)")
    parser.add_argument("--runs", default=",".join(DEFAULT_RUNS), help="which runs beside dense")
    parser.add_argument("--output", type=Path, default=Path("outputs/loss-over-bytes"))
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the table (default: OUTPUT/results.json)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()  # settings may stand anywhere
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: at least one seed")
    with ends_in_a_line(TAKEN_UP_AGAIN):
        runs = [Run.of(text) for text in args.runs.split(",")]
        output = open_output(args.output.absolute())
        found = [run_seed(seed, runs, output / f"seed-{seed}", args.overrides) for seed in range(args.seeds)]
    rows = [summary(name, found) for name in found[0]]
    about = {"seeds": args.seeds, "overrides": args.overrides, "made_with": provenance()}
    place = args.json or output / "results.json"
    write_json({"rows": rows, **about}, place)
    print_table(rows, args.seeds)
    print(f"results: {place}")


def run_seed(seed: int, runs: list[Run], output: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """All runs of one seed: name -> results."""
    common = [f"seed={seed}", *overrides]
    artifact = output / "codec"
    if any(run.needs_artifact for run in runs):
        made = output / "tgap"
        own = [*common, f"output={made}", f"tgap.artifact={artifact}", "tgap.codecs=[learned]"]
        Console(stderr=True).rule(f"seed {seed}: TGAP")
        run_once("tgap", own, made / "report.json")
    found = {"dense": _federate(["arm=dense", *common], output / "dense")}
    for run in runs:
        own = ["arm=coded", *run.overrides, *common]
        own += [f"codec.artifact={artifact}"] if run.needs_artifact else []
        found[run.name] = _federate(own, output / re.sub(r"[^A-Za-z0-9@._-]", "_", run.name))
    return found


def summary(name: str, found: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """One run over all seeds, dense of the same seed beside it."""
    base = [runs["dense"]["heldout_loss"][0] for runs in found]
    dense = [runs["dense"]["heldout_loss"][-1] for runs in found]
    mine = [runs[name] for runs in found]
    final = [run["heldout_loss"][-1] for run in mine]
    behind = [loss - best for loss, best in zip(final, dense, strict=True)]
    kept = [kept_fraction(b, d, loss) for b, loss, d in zip(base, final, dense, strict=True)]
    reached = {
        f"{share:g}": _mean_or_none(
            [_bytes_until(run, b - share * (b - d)) for run, b, d in zip(mine, base, dense, strict=True)]
        )
        for share in SHARES
    }
    return {
        "run": name,
        "bits": mean(run["bits_per_parameter"] for run in mine),
        "bytes_per_client_round": mean(run["uplink_payload_bytes_per_client_round"] for run in mine),
        "final_loss": mean(final),
        "final_loss_spread": spread_of(final),
        "behind_dense": mean(behind),
        "behind_dense_spread": spread_of(behind),
        "kept_fraction": mean(kept),
        "kept_by_seed": kept,
        "bytes_until": reached,
        "heldout_loss": [mean(losses) for losses in zip(*(run["heldout_loss"] for run in mine), strict=True)],
    }


def print_table(rows: list[dict[str, Any]], num_seeds: int) -> None:
    table = Table(title=f"held-out loss over bytes, {num_seeds} seeds; ± is the standard deviation over seeds")
    shares = [f"KB to {100 * share:.0f} %" for share in SHARES]
    for column in ("run", "bits", "bytes", "final loss", "behind dense", "kept", *shares):
        table.add_column(column, no_wrap=True, justify="left" if column == "run" else "right")
    for row in rows:
        reached = [f"{size / 1000:.1f}" if size is not None else "-" for size in row["bytes_until"].values()]
        table.add_row(
            row["run"],
            f"{row['bits']:.3f}",
            f"{row['bytes_per_client_round']:,.0f}",
            f"{row['final_loss']:.4f} ± {row['final_loss_spread']:.4f}",
            f"{row['behind_dense']:+.4f} ± {row['behind_dense_spread']:.4f}",
            f"{100 * row['kept_fraction']:.1f} %",
            *reached,
        )
    Console(width=130 if not sys.stdout.isatty() else None).print(table)


def _bytes_until(run: dict[str, Any], loss: float) -> float | None:
    """Bytes that a client sent in every round until the held-out loss fell to ``loss``; None: it never did."""
    for number, reached in enumerate(run["heldout_loss"]):
        if reached <= loss:
            return float(number * run["uplink_payload_bytes_per_client_round"])
    return None


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _federate(overrides: list[str], place: Path) -> dict[str, Any]:
    Console(stderr=True).rule(f"{place.parent.name}: {place.name}")
    own = [*overrides, f"output={place}", f"hydra.run.dir={place}"]
    content: dict[str, Any] = run_once("server.federate", own, place / "results.json")
    return content


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


if __name__ == "__main__":
    main()
