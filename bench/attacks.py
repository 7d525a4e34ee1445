"""Malicious clients beside every robust strategy: what two of ten can do, and what the defence costs the honest.

    python -m bench.attacks [--seeds 3] [--rounds 3] [--steps 4] [--json OUT]

Ten clients of the embedded task, each with packages of its own, train the small model; all take part in every round,
two are malicious (``attackers.py``). What they send goes through the learned codec at 0.5 bit and the strategies of a
run; only Flower's processes are left out. Held-out loss is that of the eight honest clients, *kept* the share of what
the mean of ten honest ones improves. A run that ends above the base model kept less than nothing; one that diverged
says so. The last table has no attackers: two clients write what the others do not (their tokens are renamed), and what
a rule drops is then what it drops of them.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.settings import TrainSettings
from bench.attackers import ABSENT, ATTACKS
from bench.lab import BATCH, CLIENTS, WINDOW, Defence, Lab, Outcome
from bench.programs import ends_in_a_line, kept_fraction
from conf import CHECKOUT
from conf.output import provenance, write_json
from strategies.settings import StrategySettings

MALICIOUS = MINORITY = (4, 7)
TOLERANCE = 0.9
"""The goal: with the best defence so much of the clean improvement is kept under every attack."""


def shipped(name: str, **changes: Any) -> StrategySettings:
    """The settings of ``strategy=NAME``, as they stand in ``conf/strategy``."""
    return StrategySettings(**{**dict(OmegaConf.load(CHECKOUT / "conf" / "strategy" / f"{name}.yaml")), **changes})


DEFENCES = {
    "mean": Defence("relative bounds, the default", shipped("fedavg")),
    "bounded mean": Defence("strategy.max_norm at the usual norm, too", shipped("fedavg"), usual_norms=1.0),
    "fedmedian": Defence("the middle of every coordinate", shipped("fedmedian")),
    "fedtrimmedavg": Defence("two cut on each side of every coordinate", shipped("fedtrimmedavg")),
    "multikrum": Defence("the mean of eight of ten", shipped("multikrum")),
    "rfa": Defence("the geometric median", shipped("rfa")),
    "centredclip": Defence("around the last round's aggregate", shipped("centredclip")),
    "fltrust": Defence("four clean windows of every client at the server", shipped("fltrust")),
    "krum": Defence("one of ten", shipped("krum")),
    "bulyan": Defence("for one malicious client: of ten it bears no more", shipped("bulyan")),
    "open mean": Defence("no bound on norms", shipped("fedavg", clip_norm_ratio=None, max_norm_ratio=None)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many (default 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a client in a round")
    parser.add_argument("--defences", default=",".join(DEFENCES), help="default: all")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="default: all")
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the figures, after every seed")
    args = parser.parse_args()
    defences, attacks = args.defences.split(","), args.attacks.split(",")
    for chosen, known in ((defences, DEFENCES), (attacks, ATTACKS)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    if defences[0] != "mean" or "none" not in attacks:
        parser.error(
            "all are compared with the mean without an attack: mean must be the first defence, and none an attack"
        )
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # every scaled update is a warning
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # Message() wants them
    train = TrainSettings(update="delta", lr=0.005, steps=args.steps, batch_size=BATCH, micro_batch_size=BATCH)
    runs: list[dict[str, Any]] = []
    about = {"rounds": args.rounds, "steps": args.steps, "batch_size": BATCH, "window": WINDOW, "bits": 0.5}
    about["made_with"] = provenance()  # of what is loaded now: the bench takes long
    results: dict[str, Any] = {}
    with ends_in_a_line():
        for seed in range(args.seeds):
            for run in measure(seed, args.rounds, train, defences, attacks):  # each with one defence more
                whole = seed == 0 or len(run["cells"]) == len(defences)
                results = summary([*runs, run] if whole else runs, attacks)
                command = f"python -m bench.attacks --seeds {len(results['seeds'])}"
                command += f" --rounds {args.rounds} --steps {args.steps} --json {args.json}"
                if args.json is not None:
                    write_json({**results, **about, "command": command}, args.json)
            runs.append(run)
    print_tables(results)


def measure(
    seed: int, rounds: int, train: TrainSettings, defences: Sequence[str], attacks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The runs of one seed, given after every defence with all that are done. Losses are means over the honest clients,
    None where training diverged."""
    honest = [client for client in range(CLIENTS) if client not in MALICIOUS]
    lab, mixed = Lab(seed, rounds, train), Lab(seed, rounds, train, renamed=MINORITY)
    base, started = lab.losses(lab.initial), time.perf_counter()
    found: dict[str, Any] = {
        "seed": seed,
        "base": mean(base[client] for client in honest),
        "base_by_client": base,
        "without_them": lab.run(DEFENCES["mean"], ABSENT, MALICIOUS).loss(honest),
        "cells": {},
        "minority": {"base": _of_both(Outcome(mixed.losses(mixed.initial), 0, 0.0)), "after": {}},
    }
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"seed {seed}", total=len(defences) * (len(attacks) + 1))
        for name in defences:
            cells: dict[str, Any] = {}
            for attack in attacks:
                outcome = lab.run(DEFENCES[name], ATTACKS[attack], () if attack == "none" else MALICIOUS)
                cells[attack] = {"loss": outcome.loss(honest), "lost_rounds": outcome.lost_rounds}
                if attack == "none":
                    cells[attack] |= {"by_client": outcome.by_client, "seconds": outcome.seconds}
                progress.advance(task)
            found["minority"]["after"][name] = _of_both(mixed.run(DEFENCES[name], ATTACKS["none"], ()))
            progress.advance(task)
            found["cells"][name], found["seconds"] = cells, time.perf_counter() - started
            yield found


def _of_both(outcome: Outcome) -> dict[str, float | None]:
    """Held-out losses where two clients write something else: of these, and of the others."""
    others = [client for client in range(CLIENTS) if client not in MINORITY]
    return {"minority": outcome.loss(MINORITY), "majority": outcome.loss(others)}


def summary(runs: Sequence[dict[str, Any]], attacks: Sequence[str]) -> dict[str, Any]:
    """Means over seeds of what was kept, and for every attack the defence that kept most. A diverged run keeps
    nothing that could be averaged: its cell is None."""
    defences = [*runs[0]["cells"]]

    def clean(run: dict[str, Any]) -> float:
        return float(run["cells"]["mean"]["none"]["loss"])

    def kept(run: dict[str, Any], defence: str, attack: str) -> float | None:
        loss = run["cells"][defence][attack]["loss"]
        return None if loss is None else kept_fraction(run["base"], clean(run), loss)

    table = {d: {a: _mean([kept(run, d, a) for run in runs]) for a in attacks} for d in defences}
    best = {}
    for attack in attacks:
        most, name = max((-math.inf if (share := table[d][attack]) is None else share, d) for d in defences)
        best[attack] = {"defence": name, "kept": table[name][attack], "reached": most >= TOLERANCE}
    worst = {d: _mean([_least([kept(run, d, a) for a in attacks]) for run in runs]) for d in defences}
    return {
        "kept": table,
        "kept_without_them": _mean([kept_fraction(run["base"], clean(run), run["without_them"]) for run in runs]),
        "worst_kept": worst,
        "best": best,
        "worst_client": {d: _mean([_worst_client(run, d) for run in runs]) for d in defences},
        "minority_kept": {d: _minority(runs, d) for d in defences},
        "attacks": {name: ATTACKS[name].about for name in attacks},
        "defences": {name: DEFENCES[name].about for name in defences},
        "clients": CLIENTS,
        "malicious": len(MALICIOUS),
        "seeds": [run["seed"] for run in runs],
        "runs": [*runs],
    }


def _worst_client(run: dict[str, Any], defence: str) -> float | None:
    """Without attackers: what the client that gains least gains, as a share of what it gains with the mean."""
    after, clean = (run["cells"][name]["none"]["by_client"] for name in (defence, "mean"))
    if after is None or clean is None:
        return None
    return min(kept_fraction(*losses) for losses in zip(run["base_by_client"], clean, after, strict=True))


def _minority(runs: Sequence[dict[str, Any]], defence: str) -> dict[str, float | None]:
    """What minority and majority gain, as a share of what each gains with the mean."""

    def share(run: dict[str, Any], who: str) -> float | None:
        base, after = run["minority"]["base"][who], run["minority"]["after"]
        if after[defence][who] is None or after["mean"][who] is None:
            return None
        return kept_fraction(base, after["mean"][who], after[defence][who])

    return {who: _mean([share(run, who) for run in runs]) for who in ("minority", "majority")}


def _least(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) and known else None


def tables_of(results: dict[str, Any]) -> dict[str, list[list[str]]]:
    """By title, the columns' names and the rows: what is kept under every attack, who keeps most, and the costs."""
    attacks, kept = list(results["attacks"]), results["kept"]
    under = [["defence", *attacks, "least"]]
    under += [[d, *(_percent(kept[d][a]) for a in attacks), _percent(results["worst_kept"][d])] for d in kept]
    best = [["attack", "what it is", "best defence", "kept", "goal"]]
    for attack, found in results["best"].items():
        goal = "reached" if found["reached"] else "missed"
        best.append([attack, results["attacks"][attack], found["defence"], _percent(found["kept"]), goal])
    costs = [["defence", "all", "who gains least", "two of another kind", "the other eight"]]
    for name in kept:
        of_two = results["minority_kept"][name]
        figures = kept[name]["none"], results["worst_client"][name], of_two["minority"], of_two["majority"]
        costs.append([name, *map(_percent, figures)])
    return {
        "kept of the clean improvement, per cent": under,
        "the best defence against each": best,
        "without attackers: gain, as per cent of the mean's": costs,
    }


def print_tables(results: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, (columns, *rows) in tables_of(results).items():
        table = Table(title=title)
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    seeds = ", ".join(map(str, results["seeds"]))
    console.print(f"seeds {seeds}; the eight honest ones alone keep {_percent(results['kept_without_them'])} %")


def markdown_of(rows: list[list[str]]) -> str:
    """A table as it stands in docs/robustness.md."""
    columns, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([columns, "|" + "---|" * len(rows[0]), *others])


def _percent(value: float | None) -> str:
    return "diverged" if value is None else f"{100 * value:.0f}"


if __name__ == "__main__":
    main()
