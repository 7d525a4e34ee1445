"""An app that knows nothing of codes, before and after a diff of five lines: bytes by its own meter, and held-out loss.

    python -m bench.flowertune [--seeds 3] [--bits 0.25,0.5,1] [--rounds 12] [--engine here] [--json OUT]
    python -m bench.flowertune --seeds 1 --bits 0.5 [--python VENV/bin/python]

The app is ``examples/flowertune``, the diff its ``coded.diff``. Each run is ``flwr run`` of a copy of it in Flower's
simulation, in the environment of ``--python``: there Flower, PEFT, transformers and gradcodec are enough. With
``--engine here`` clients take turns in one process instead, which gives the same without the engine's start. Both ways
get as many bits a parameter; for others than 0.5 the copy's server_app.py hands them to the strategy, besides the diff.

Clients fine-tune the embedded model on the standard library's functions: the signature and what the docstring says are
the instruction, the body is the response. "kept" is the share of the uncoded run's improvement that a run has.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
from bench.programs import ends_in_a_line, kept_fraction, spread_of
from conf.output import provenance, write_json, write_text
from tasks.stdlib import packages

APP = REPOSITORY / "examples" / "flowertune"
NUM_CLIENTS = 4
DEFAULT_BITS = 0.5
SETTINGS: dict[str, str | int | float | bool] = {
    "model.name": str(REPOSITORY / "assets" / "tiny-llama"),
    "lora.r": 8,
    "lora.alpha": 16,
    "dataset.heldout-most": 32,
    "train.seq-length": 128,
    "train.batch-size": 4,
    "train.max-steps": 5,
    "train.learning-rate-max": 5e-3,
    "train.learning-rate-min": 5e-4,
}
_BODY_CHARACTERS = range(80, 600)
_VERSIONS = ("flwr", "torch", "transformers", "peft", "gradcodec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many, starting at 0 (default 3)")
    parser.add_argument("--bits", default="0.25,0.5,1", help="a parameter, both ways")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, where no engine is used")
    parser.add_argument("--engine", choices=("flwr", "here"), default="flwr")
    parser.add_argument(
        "--python", type=Path, default=Path(sys.executable), help="of the environment that runs the app"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    if min(args.seeds, args.rounds, args.jobs) < 1:
        parser.error("--seeds, --rounds, --jobs: at least one")
    python = args.python if args.engine == "flwr" else None
    shown = {name: value for name, value in SETTINGS.items() if name != "model.name"}
    about = {"clients": NUM_CLIENTS, "rounds": args.rounds, "settings": {"model": "tiny-llama", **shown}}
    about |= {"engine": args.engine, "versions_of_the_app": versions_in(args.python, _VERSIONS)}
    about |= {"made_with": provenance()}
    runs: list[dict[str, Any]] = []
    with ends_in_a_line(also=(OSError,)):
        rates = [None, *map(float, args.bits.split(","))]
        start = partial(run_seed, rates=rates, rounds=args.rounds, python=python)
        with ProcessPoolExecutor(1 if python else args.jobs, get_context("spawn")) as pool:
            for of_seed in pool.map(start, range(args.seeds)):
                runs += of_seed
                if args.json is not None:  # a bench that is stopped keeps the seeds that it has done
                    write_json({"rows": summary(runs), "runs": runs, **about}, args.json)
    print_rows(summary(runs), args.rounds, args.seeds)


def run_seed(seed: int, rates: list[float | None], rounds: int, python: Path | None) -> list[dict[str, Any]]:
    """All runs of a seed."""
    return [run(seed, bits, rounds, python) for bits in rates]


def run(seed: int, bits: float | None, rounds: int, python: Path | None) -> dict[str, Any]:
    """One run of the app as it is (``bits`` None) or with the diff; ``python``: None, if no engine is used. Raises
    ValueError: it failed."""
    Console(stderr=True).rule(f"seed {seed}: {'as it is' if bits is None else f'coded, {bits:g} bit'}")
    with tempfile.TemporaryDirectory(prefix="flowertune-") as scratch:
        app, data = Path(scratch) / "app", Path(scratch) / "functions.jsonl"
        copy_app(app, bits)
        write_text("".join(json.dumps(record) + "\n" for record in functions()), data)
        given = {**SETTINGS, "dataset.name": str(data), "num-server-rounds": rounds, "seed": seed}
        logging.getLogger("flwr").setLevel(logging.WARNING)
        found = run_app_here(app, given, NUM_CLIENTS) if python is None else run_app(app, given, NUM_CLIENTS, python)
        return {"seed": seed, "bits": bits, **found}


def copy_app(place: Path, bits: float | None) -> None:
    """The app as it is (``bits`` None), or with the diff."""
    shutil.copytree(APP, place, ignore=shutil.ignore_patterns("__pycache__"))
    if bits is None:
        return
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(place.parent)}  # of a repository that it may lie in
    subprocess.run(["git", "apply", str(APP / "coded.diff")], cwd=place, env=outside, check=True)
    if bits != DEFAULT_BITS:
        server = place / "flowertune" / "server_app.py"
        text = server.read_text(encoding="utf-8")
        server.write_text(text.replace("FlowerTuneLlm(", f"FlowerTuneLlm(bits={bits}, down_bits={bits}, "))


def functions() -> Iterator[dict[str, str]]:
    """The standard library's functions that say what they do, as instructions and responses."""
    for files in packages().values():
        for file in files:
            try:
                source = file.read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (SyntaxError, UnicodeDecodeError):  # a few show broken syntax on purpose
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (record := _record(node, source.splitlines())) is not None:
                    yield record


def _record(node: ast.FunctionDef, lines: list[str]) -> dict[str, str] | None:
    said = ast.get_docstring(node)
    if not said or len(node.body) < 2:
        return None
    body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
    if len(body) not in _BODY_CHARACTERS:
        return None
    return {"instruction": f"def {node.name}({ast.unparse(node.args)}):\n{said[:200]}", "response": body}


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a rate, over seeds; the run of the same seed as it is beside it."""
    plain = {one["seed"]: one for one in runs if one["bits"] is None}
    rows = []
    for bits in dict.fromkeys(one["bits"] for one in runs):
        mine = [one for one in runs if one["bits"] == bits]
        final = [one["heldout_loss"][-1] for one in mine]
        kept = [
            kept_fraction(one["heldout_loss"][0], plain[one["seed"]]["heldout_loss"][-1], one["heldout_loss"][-1])
            for one in mine
        ]
        rows.append(
            {
                "bits": bits,
                "megabytes": mean(one["megabytes"] for one in mine),
                "fraction_of_bytes": mean(one["megabytes"] / plain[one["seed"]]["megabytes"] for one in mine),
                "loss_before": mean(one["heldout_loss"][0] for one in mine),
                "loss_after": mean(final),
                "loss_after_spread": spread_of(final),
                "kept": mean(kept),
                "kept_spread": spread_of(kept),
                "seconds": mean(one["seconds"] for one in mine),
            }
        )
    return rows


def print_rows(rows: list[dict[str, Any]], rounds: int, seeds: int) -> None:
    title = f"{NUM_CLIENTS} clients, {rounds} rounds, {seeds} seeds; ± is the standard deviation over seeds"
    table = Table(title=title)
    for column in ("app", "MB by its meter", "of its bytes", "loss before", "loss after", "kept", "seconds"):
        table.add_column(column, no_wrap=True, justify="left" if column == "app" else "right")
    for row in rows:
        table.add_row(
            "as it is" if row["bits"] is None else f"coded, {row['bits']:g} bit",
            f"{row['megabytes']:.3f}",
            f"1/{1 / row['fraction_of_bytes']:.1f}",
            f"{row['loss_before']:.4f}",
            f"{row['loss_after']:.4f} ± {row['loss_after_spread']:.4f}",
            f"{100 * row['kept']:.1f} ± {100 * row['kept_spread']:.1f} %",
            f"{row['seconds']:.0f}",
        )
    Console(width=130 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
