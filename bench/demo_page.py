"""The demos' results as a page (``report``): arms beside each other, what each keeps of dense's improvement, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import charts
from report.charts import Cell, Row
from report.page import Facts, Figure, Part, Section, Table, Text, write_page

LOSS = "held-out loss, nats per token"
SENT = "uplink payload bytes per client, all its rounds"
CODING = "Coding is the part of a client's work, training included, that encoding and decoding take."


def write_demo_page(results: Mapping[str, Any], path: Path) -> None:
    """Writes ``report.html`` and ``report.json`` of ``bench.arms.summary``, each whole or not at all."""
    seeds = ", ".join(map(str, results["seeds"]))
    lead = (
        f"The coded federation keeps {100 * results['kept_fraction']:.1f} % of the improvement of the dense one "
        f"({results['dense_improvement']:.3f} nat), seeds {seeds}."
    )
    sections = [
        Section("Arms", [_arms(results), _kept(results), Text(CODING)]),
        Section("Loss", [_over_rounds(results), *_over_bytes(results)]),
        *_fidelity(results),
        *(Section(title, [_table(title, rows)]) for title, rows in results.get("tables", {}).items()),
    ]
    write_page(path, str(results.get("title", "CG-FedLLM demo")), lead, sections, results["made_with"])


def _arms(results: Mapping[str, Any]) -> Table:
    arms = results["arms"]
    base, dense = arms["base"]["heldout_loss"][-1], arms["dense"]["heldout_loss"][-1]
    rows: list[list[Cell]] = []
    for name, arm in arms.items():
        loss, sizes = arm["heldout_loss"][-1], arm.get("bytes") or {}
        sent = arm["uplink_payload_bytes_per_client_round"]
        rows.append(
            [
                name,
                loss,
                None if name == "base" or base == dense else 100 * (base - loss) / (base - dense),
                sent or None,
                arm["bits_per_parameter"] if sent else None,
                sizes.get("total") or None,
                100 * arm["coding_share"] if name.startswith("coded") else None,
                arm["seconds"],
            ]
        )
    columns = (
        "arm", "final held-out loss", "kept, %", "uplink bytes / client / round", "bits / parameter", "bytes in all",
        "coding, %", "seconds",
    )  # fmt: skip
    return Table("Means over seeds", columns, rows)


def _kept(results: Mapping[str, Any]) -> Part:
    by_seed = {f"coded keeps, seed {run['seed']}": f"{100 * run['kept_fraction']:.1f} %" for run in results["runs"]}
    return Facts({**by_seed, "dense improves by, nat": results["dense_improvement"]})


def _over_rounds(results: Mapping[str, Any]) -> Figure:
    rows: list[Row] = []
    rounds = max(len(arm["heldout_loss"]) for arm in results["arms"].values())
    ordered = sorted(results["arms"].items(), key=lambda item: not item[1]["uplink_payload_bytes_per_client_round"])
    for name, arm in ordered:  # those without clients last, so that both figures have the same colours
        losses = arm["heldout_loss"]
        single = [run["arms"][name]["heldout_loss"] for run in results["runs"]]
        untrained = len(losses) == 1
        for number in (0, rounds - 1) if untrained else range(len(losses)):
            at = 0 if untrained else number
            of_seeds = [loss[at] for loss in single]
            ends = {"least": min(of_seeds), "most": max(of_seeds)}
            rows.append({"arm": name, "round": number, LOSS: losses[at], **ends})
    band = ("least", "most") if len(results["runs"]) > 1 else None
    spread = " A band is from the least to the most over seeds." if band else ""
    alt = f"Held-out loss after each round, one line an arm; the base model is not trained.{spread}"
    return Figure("Loss over rounds", alt, charts.lines(rows, "round", LOSS, "arm", band=band), rows)


def _over_bytes(results: Mapping[str, Any]) -> list[Figure]:
    rows: list[Row] = [
        {"arm": name, "round": number, SENT: number * arm["uplink_payload_bytes_per_client_round"], LOSS: loss}
        for name, arm in results["arms"].items()
        if arm["uplink_payload_bytes_per_client_round"]
        for number, loss in enumerate(arm["heldout_loss"])
        if number
    ]
    if not rows:
        return []
    alt = "Held-out loss over what a client that takes part in every round has sent up, on a logarithmic axis."
    return [Figure("Loss over bytes up", alt, charts.lines(rows, SENT, LOSS, "arm", log_x=True), rows)]


def _fidelity(results: Mapping[str, Any]) -> list[Section]:
    """Of the demos that train a codec."""
    rows: Sequence[Mapping[str, Any]] = results["runs"][0].get("tgap_fidelity", [])
    if not rows:
        return []
    title = "Fidelity of single updates that the codecs were not trained on (first seed)"
    keys = {
        "codec": "codec",
        "heldout": "held out",
        "bits": "bits / parameter",
        "cosine": "cosine",
        "snr_db": "SNR, dB",
    }
    cells: list[list[Cell]] = [[row[key] for key in keys] for row in rows]
    return [Section("TGAP", [Table(title, list(keys.values()), cells)])]


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(rows[0])
    cells: list[list[Cell]] = [[_cell(row[column]) for column in columns] for row in rows]
    return Table(title, columns, cells)


def _cell(value: Any) -> Cell:
    return value if isinstance(value, (str, int, float)) or value is None else str(value)
