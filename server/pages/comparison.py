"""The report of several finished runs: by which settings they differ, what each reached, and for how many bytes.

Runs that differ by their seed alone are one *kind*: it has means, and how far its runs spread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from conf.output import open_output, provenance
from conf.standard import SETTLED
from report import charts
from report.charts import Cell, Row
from report.page import Facts, Figure, Part, Section, Table, Text, write_csv, write_page
from server.pages.terms import COMPARED, TERMS
from server.records.curves import pareto_front
from server.records.finished import Failure, FinishedRun

REPORT = "report.html"
SEED = "seed"
MOST_CURVES = 24
"""Kinds whose loss is drawn round by round: the best."""
MOST_ROUNDS = 200
"""Points of a curve."""
LONGEST_LABEL = 120
LOSS = "held-out loss, nats per token"
IN_ALL = "bytes in all"
KIND = "run"


@dataclass(frozen=True)
class Kind:
    """Runs that differ by their seed alone."""

    label: str
    runs: Sequence[FinishedRun]

    @property
    def loss(self) -> float:
        return fmean(run.loss for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final loss over seeds; None of one run."""
        losses = [run.loss for run in self.runs]
        return stdev(losses) if len(losses) > 1 and all(map(math.isfinite, losses)) else None

    @property
    def bytes_in_all(self) -> float:
        return fmean(run.bytes_in_all for run in self.runs)


def write_comparison(runs: Sequence[FinishedRun], failures: Sequence[Failure], output: Path, title: str) -> list[Kind]:
    """Writes ``report.html``, ``report.json`` and ``report.csv`` into the folder. Raises ValueError: there is nothing
    to compare, or the folder cannot be written to."""
    if not runs:
        raise ValueError("none of the runs has finished: there is nothing to compare")
    kinds = kinds_of(runs)
    open_output(output)
    write_page(output / REPORT, title, lead_of(kinds, failures), sections_of(kinds, failures), provenance())
    write_csv(runs_table(kinds), (output / REPORT).with_suffix(".csv"))
    return kinds


def kinds_of(runs: Sequence[FinishedRun]) -> list[Kind]:
    """In the order of their first runs."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        rest = {key: value for key, value in run.settings.items() if key != SEED}
        found.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(run)
    keys = [key for key in differing_settings(runs) if key not in (SEED, *SETTLED)]
    labels = [_label(members[0], keys) for members in found.values()]
    return [
        Kind(label if labels.count(label) == 1 else f"{number}: {label}", members)
        for number, (label, members) in enumerate(zip(labels, found.values(), strict=True))
    ]


def differing_settings(runs: Sequence[FinishedRun]) -> list[str]:
    """The settings that not all of the runs have alike which have them, in the order in which settings stand."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({_told(run, key) for run in runs if key in run.settings}) > 1]


def _told(run: FinishedRun, key: str) -> str:
    if key not in run.settings:
        return "–"
    value = run.settings[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _label(run: FinishedRun, keys: Sequence[str]) -> str:
    own = {key: _told(run, key) for key in keys if run.settings.get(key) is not None}
    label = ", ".join(f"{key}={value}" for key, value in own.items()) or str(run.settings.get("arm", KIND))
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 4] + " ..."


def on_the_front(kinds: Sequence[Kind]) -> list[bool]:
    """Which of them no other betters in loss and bytes; what asked no clients has no bytes, and is none of them."""
    asked = [kind for kind in kinds if kind.bytes_in_all > 0]
    front = dict(zip(map(id, asked), pareto_front([(kind.bytes_in_all, kind.loss) for kind in asked]), strict=True))
    return [front.get(id(kind), False) for kind in kinds]


def lead_of(kinds: Sequence[Kind], failures: Sequence[Failure]) -> str:
    """What it comes to, in a sentence or two."""
    runs = sum(len(kind.runs) for kind in kinds)
    best = min(kinds, key=lambda kind: kind.loss)
    text = f"{runs:,} finished runs of {len(kinds):,} kinds. " if runs > 1 else "One finished run. "
    spread = "" if best.spread is None else f" ± {best.spread:.4f} over {len(best.runs)} seeds"
    text += f"The lowest held-out loss is {best.loss:.4f}{spread} ({best.label})."
    return text + (f" {len(failures):,} did not finish." if failures else "")


def sections_of(kinds: Sequence[Kind], failures: Sequence[Failure]) -> list[Section]:
    """All of the page."""
    runs = [run for kind in kinds for run in kind.runs]
    differ = differing_settings(runs)
    said = f"They differ by {', '.join(differ)}." if differ else "All of their settings are the same."
    failed: list[list[Cell]] = [[failure.folder, failure.reason] for failure in failures]
    sections = [
        Section("Beside each other", [_best(kinds), kinds_table(kinds), *([Text(said)] if len(runs) > 1 else [])]),
        Section("What did not finish", [Table("Runs without results", ("folder", "why"), failed)] if failed else []),
        Section("Loss", _losses(kinds)),
        Section("Loss for bytes", _front(kinds)),
        Section("Settings that differ", [_settings(runs, differ)] if differ else []),
        Section("Single runs", [runs_table(kinds)]),
        Section(
            "What the words mean", [Table("Words", ("word", "meaning"), [(w, TERMS[w]) for w in COMPARED])], closed=True
        ),
    ]
    return [section for section in sections if section.parts]


def _best(kinds: Sequence[Kind]) -> Facts:
    best = min(kinds, key=lambda kind: kind.loss)
    facts: dict[str, Cell] = {"lowest held-out loss": best.loss, "of": best.label}
    if best.bytes_in_all:
        facts["for bytes in all"] = round(best.bytes_in_all)
    return Facts(facts)


def kinds_table(kinds: Sequence[Kind]) -> Table:
    """One row a kind, means over its seeds."""
    front = on_the_front(kinds)
    rows: list[list[Cell]] = [
        [
            kind.label,
            len(kind.runs),
            kind.loss,
            kind.spread,
            round(kind.bytes_in_all),
            fmean(run.bytes_up for run in kind.runs),
            fmean(run.bits_per_parameter for run in kind.runs),
            fmean(run.seconds for run in kind.runs),
            best,
        ]
        for kind, best in zip(kinds, front, strict=True)
    ]
    columns = (
        KIND, "seeds", "held-out loss", "± over seeds", IN_ALL, "bytes up per client and round", "bits per parameter",
        "seconds", "on the front",
    )  # fmt: skip
    return Table("Means over seeds", columns, rows)


def runs_table(kinds: Sequence[Kind]) -> Table:
    """One row a run."""
    rows: list[list[Cell]] = [
        [kind.label, str(run.seed), run.loss, run.bytes_in_all, run.bits_per_parameter, run.seconds, run.folder]
        for kind in kinds
        for run in kind.runs
    ]
    columns = (KIND, "seed", "held-out loss", IN_ALL, "bits per parameter", "seconds", "folder")
    return Table("Every run", columns, rows)


def _losses(kinds: Sequence[Kind]) -> list[Part]:
    curved = [kind for kind in kinds if any(len(run.losses) > 1 for run in kind.runs)]
    best = {id(kind) for kind in sorted(curved, key=lambda kind: kind.loss)[:MOST_CURVES]}
    drawn = [kind for kind in curved if id(kind) in best]
    drawn.sort(key=lambda kind: not kind.bytes_in_all)  # last, so that all figures have the same colours
    rows = [row for kind in drawn for row in _curve(kind)]
    if not rows:
        return []
    left = f" The best {MOST_CURVES} of {len(curved)} are drawn." if len(curved) > MOST_CURVES else ""
    several = any(len(kind.runs) > 1 for kind in drawn)
    band = "; a band is from the least to the most over seeds" if several else ""
    over_rounds = charts.lines(rows, "round", LOSS, KIND, band=("least", "most") if several else None)
    parts: list[Part] = [
        Figure("Loss over rounds", f"The held-out loss after each round{band}.{left}", over_rounds, rows)
    ]
    sent = [row for row in rows if row[IN_ALL]]
    if sent:
        alt = f"The held-out loss over all bytes up to each round, on a logarithmic axis; means over seeds.{left}"
        parts.append(Figure("Loss over bytes", alt, charts.lines(sent, IN_ALL, LOSS, KIND, log_x=True), sent))
    return parts


def _curve(kind: Kind) -> list[Row]:
    rounds = max(len(run.losses) for run in kind.runs)
    step = max(1, -(-rounds // MOST_ROUNDS))
    rows: list[Row] = []
    for number in sorted({*range(0, rounds, step), rounds - 1}):
        there = [run for run in kind.runs if len(run.losses) > number]
        losses = [run.losses[number] for run in there]
        sizes = round(fmean(run.bytes_by_round[number] for run in there))
        rows.append(
            {
                KIND: kind.label,
                "round": number,
                LOSS: fmean(losses),
                "least": min(losses),
                "most": max(losses),
                IN_ALL: sizes,
            }
        )
    return rows


def _front(kinds: Sequence[Kind]) -> list[Part]:
    rows: list[Row] = [
        {KIND: kind.label, IN_ALL: round(kind.bytes_in_all), LOSS: kind.loss, "on the front": best}
        for kind, best in zip(kinds, on_the_front(kinds), strict=True)
        if kind.bytes_in_all > 0
    ]
    if len(rows) < 2:
        return []
    best = [str(row[KIND]) for row in rows if row["on the front"]]
    alt = (
        "The final held-out loss of each kind over all its bytes, on a logarithmic axis. The dashed line connects "
        f"those that no other betters in both: {'; '.join(best[:8])}{' and more' if len(best) > 8 else ''}."
    )
    series = KIND if len(rows) <= MOST_CURVES else "on the front"
    chart = charts.points(rows, IN_ALL, LOSS, series, log_x=True, front="on the front")
    return [Figure("Pareto front of loss over bytes", alt, chart, rows)]


def _settings(runs: Sequence[FinishedRun], differ: Sequence[str]) -> Table:
    rows: list[list[Cell]] = [[run.folder, *(_told(run, key) for key in differ)] for run in runs]
    return Table("Settings that are not the same in all runs", ("folder", *differ), rows)
