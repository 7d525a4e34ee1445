"""The demo's results as one HTML file without outside parts: tables, and plots as inline SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conf.output import write_text

matplotlib.use("svg")
COLOURS = {
    "base": "#8a8a8a",
    "centralised": "#1b7f5c",
    "dense": "#2457a6",
    "coded": "#d1495b",
    "coded both ways": "#e9a03b",
    "coded both ways, 0.1 bit": "#e9a03b",
}


def write_report(results: dict[str, Any], path: Path) -> None:
    """Writes the file whole or not at all."""
    rounds, over_bytes = _loss_over_rounds(results), _loss_over_bytes(results)
    write_text(
        PAGE.format(
            kept=100 * results["kept_fraction"],
            improvement=results["dense_improvement"],
            seeds=", ".join(map(str, results["seeds"])),
            rounds=rounds,
            over_bytes=over_bytes,
            arms=_arms_table(results),
            title=html.escape(results.get("title", "CG-FedLLM demo")),
            more="".join(_more(results)),
            made_with=html.escape(", ".join(f"{k} {v}" for k, v in results["made_with"].items())),
        ),
        path,
    )


def _loss_over_rounds(results: dict[str, Any]) -> str:
    figure, axes = _figure("round")
    for name, arm in results["arms"].items():
        loss = arm["heldout_loss"]
        if len(loss) == 1:
            axes.axhline(loss[0], color=COLOURS[name], linestyle=":", label=name)
            continue
        for run in results["runs"]:
            axes.plot(run["arms"][name]["heldout_loss"], color=COLOURS[name], alpha=0.25, linewidth=1)
        axes.plot(loss, color=COLOURS[name], label=name, linewidth=2)
    return _svg(figure, axes)


def _loss_over_bytes(results: dict[str, Any]) -> str:
    figure, axes = _figure("uplink payload bytes per client, all its rounds")
    for name, arm in results["arms"].items():
        if not arm["uplink_payload_bytes_per_client_round"]:
            continue
        sent = [arm["uplink_payload_bytes_per_client_round"] * i for i in range(1, len(arm["heldout_loss"]))]
        axes.plot(sent, arm["heldout_loss"][1:], color=COLOURS[name], label=name, marker="o", markersize=3)
    axes.set_xscale("log")
    return _svg(figure, axes)


def _figure(x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel("held-out loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _svg(figure: Figure, axes: Axes) -> str:
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _arms_table(results: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{arm['heldout_loss'][-1]:.4f}",
            f"{arm['uplink_payload_bytes_per_client_round']:,.0f}",
            f"{arm['bits_per_parameter']:.3f}",
            f"{arm['bytes']['total']:,.0f}" if arm.get("bytes") else "",
            f"{100 * arm['coding_share']:.1f} %" if name.startswith("coded") else "",
            f"{arm['seconds']:.0f}",
        ]
        for name, arm in results["arms"].items()
    ]
    head = ["arm", "final held-out loss", "uplink bytes / client / round", "bits / parameter"]
    head += ["bytes in all", "coding", "seconds"]
    return _table(head, rows)


def _more(results: dict[str, Any]) -> Iterator[str]:
    """What only some of the demos have."""
    if "tgap_fidelity" in results["runs"][0]:
        yield "<h2>TGAP: fidelity of single updates that the codecs were not trained on (first seed)</h2>"
        yield _tgap_table(results)
    for title, rows in results.get("tables", {}).items():
        yield f"<h2>{html.escape(title)}</h2>" + _table(list(rows[0]), [[*map(str, row.values())] for row in rows])


def _tgap_table(results: dict[str, Any]) -> str:
    rows = [
        [row["codec"], row["heldout"], f"{row['bits']:.3f}", f"{row['cosine']:.3f}", f"{row['snr_db']:.2f}"]
        for row in results["runs"][0]["tgap_fidelity"]
    ]
    return _table(["codec", "held out", "bits / parameter", "cosine", "SNR, dB"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
 figure {{ margin: 0; }} .plots {{ display: flex; flex-wrap: wrap; gap: 1rem; }} .plots > * {{ flex: 1 1 24rem; }}
 svg {{ width: 100%; height: auto; }}
 table {{ border-collapse: collapse; margin: 1rem 0; }} th, td {{ padding: .25rem .8rem; text-align: right; }}
 th:first-child, td:first-child {{ text-align: left; }} th {{ border-bottom: 2px solid #222; }}
 td {{ border-bottom: 1px solid #ddd; white-space: pre-line; }} small {{ color: #666; }}
</style>
<h1>{title}</h1>
<p>The coded federation keeps <b>{kept:.1f} %</b> of the improvement of the dense one ({improvement:.3f} nat),
seeds {seeds}.</p>
<div class="plots"><figure>{rounds}</figure><figure>{over_bytes}</figure></div>
<h2>Arms</h2>{arms}
<p><small>coding: the part of a client's work, training included, that encoding and decoding take.</small></p>
{more}
<p><small>{made_with}</small></p>
</html>
"""
