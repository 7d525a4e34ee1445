"""The figures of the documents, drawn from result files of the benches.

    python -m bench.figures [--results bench/results] [--out docs/figures]

``rate-distortion.svg`` shows every codec of every ``fidelity-*.json``: error energy over real bits per parameter.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "cg-fedllm"  # the same figure, byte for byte, from the same results
STYLES: dict[str, dict[str, Any]] = {
    "learned": {"color": "#d1495b", "linewidth": 2.4, "marker": "o"},
    "learned (general)": {"color": "#d1495b", "linestyle": ":", "marker": "o"},
    "rotated": {"color": "#2457a6", "marker": "s"},
    "powersgd": {"color": "#1b7f5c", "marker": "^"},
    "b-only": {"color": "#8a6d3b", "marker": "v"},
    "topk": {"color": "#7a5195", "marker": "D"},
    "eden": {"color": "#555555", "marker": "x"},
    "sign": {"color": "#000000", "marker": "*", "linestyle": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    found = sorted(args.results.glob("fidelity-*.json"))
    if not found:
        sys.exit(f"error: no fidelity-*.json in {args.results}: `python -m bench.fidelity --json` writes one")
    args.out.mkdir(parents=True, exist_ok=True)
    place = args.out / "rate-distortion.svg"
    draw({path.stem.removeprefix("fidelity-"): json.loads(path.read_text()) for path in found}, place)
    print(place)


def draw(results: dict[str, dict[str, Any]], place: Path) -> None:
    """One picture a result file, side by side."""
    figure = Figure(figsize=(5.2 * len(results), 4.2), layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for codec, style in STYLES.items():
            points = sorted((r["bits"], 10 ** (-r["snr_db"] / 10)) for r in result["rows"] if r["codec"] == codec)
            if points:
                axes.plot(*zip(*points, strict=True), label=codec, markersize=4, **style)
        bits = [0.04 * 1.1**i for i in range(35)]
        axes.plot(bits, [math.exp2(-2 * b) for b in bits], color="#bbbbbb", linewidth=1, label="i.i.d. Gaussian bound")
        axes.set(xscale="log", yscale="log", xlabel="bits per parameter, whole payload", ylabel="error energy / energy")
        axes.set_xticks([0.05, 0.1, 0.25, 0.5, 1], ["0.05", "0.1", "0.25", "0.5", "1"])
        axes.set_yticks([0.2, 0.3, 0.5, 0.7, 1.0], ["0.2", "0.3", "0.5", "0.7", "1"])
        axes.minorticks_off()
        axes.set(xlim=(0.04, 1.15), ylim=(0.19, 1.02))
        axes.set_title(f"{name}: {result['num_parameters']:,} parameters", fontsize=10)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(place, metadata={"Date": None})


if __name__ == "__main__":
    main()
