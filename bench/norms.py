"""What it is worth to train the norms beside the factors (``lora.modules_to_save=[norms]``), at equal bytes.

    python -m bench.norms [--seeds 3] [--rounds 12] [--bits 0.5,0.1] [--json OUT] [key=value ...]

Dense runs without and with the norms, and runs coded both ways at every rate: those with the norms at so much lower a
rate that a payload has as many bytes. The embedded task and model unless settings say otherwise; on SmolLM2 and text
that really differs, once ``python -m bench.demo_real`` has written it:
``python -m bench.norms --rounds 4 --seeds 2 --bits 0.5 +experiment=demo_real task.path=outputs/demo-real/text``.
All are runs that a user would start; one that was made before is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.arms import over_seeds, parsed, parser_of, run_arm
from bench.programs import kept_fraction, spread_of

WITH_NORMS = "lora.modules_to_save=[norms]"
OUTPUT = "outputs/norms"


def main() -> None:
    parser = parser_of(__doc__, OUTPUT, rounds=12)
    parser.add_argument("--bits", default="0.5,0.1", help="a parameter, both ways (default 0.5,0.1)")
    args = parsed(parser)
    try:
        rates = [float(bits) for bits in args.bits.split(",")]
    except ValueError:
        parser.error(f"--bits {args.bits}: numbers between commas are expected")

    def run_seed(output: Path, own: list[str]) -> dict[str, dict[str, Any]]:
        found = runs_of(output, [*own, "backend=inprocess", *args.overrides], rates)
        return {name: figures_of(run, found["dense"]) for name, run in found.items()}

    print_table(over_seeds(args, run_seed, mean_of))


def runs_of(output: Path, own: Sequence[str], rates: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Name -> results. By how many more values there are with the norms, the rates with them are lower."""
    found = {
        "dense": run_arm("dense", output, [*own, "arm=dense"]),
        "dense, norms": run_arm("dense, norms", output, [*own, "arm=dense", WITH_NORMS]),
    }
    share = found["dense"]["num_parameters"] / found["dense, norms"]["num_parameters"]
    for bits in rates:
        for name, settings in (
            (f"{bits:g} bit", _coded(bits)),
            (f"{bits:g} bit, norms", [*_coded(bits * share), WITH_NORMS]),
        ):
            found[name] = run_arm(name, output, [*own, *settings])
    return found


def _coded(bits: float) -> list[str]:
    return ["arm=coded", f"codec.bits={bits:.6f}", f"codec.down_bits={bits:.6f}"]


def figures_of(run: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    losses = run["heldout_loss"]
    return {
        "heldout_loss": losses,
        "kept_fraction": kept_fraction(losses[0], dense["heldout_loss"][-1], losses[-1]),
        "bytes_up_per_client_round": run["uplink_payload_bytes_per_client_round"],
        "bytes_in_all": run["bytes"]["total"],
        "num_parameters": run["num_parameters"],
    }


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over seeds; the spread is the standard deviation."""
    losses = [run["heldout_loss"][-1] for run in runs]
    rest = ("kept_fraction", "bytes_up_per_client_round", "bytes_in_all", "num_parameters")
    spread = spread_of(losses)
    return {"heldout_loss": mean(losses), "spread": spread, **{key: mean(run[key] for run in runs) for key in rest}}


def print_table(means: dict[str, dict[str, float]]) -> None:
    table = Table(title="held-out loss at the end, nats per token")
    for column in ("run", "loss", "spread", "of dense", "bytes up per client and round", "bytes in all"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, one in means.items():
        sizes = (f"{one[key]:,.0f}" for key in ("bytes_up_per_client_round", "bytes_in_all"))
        table.add_row(
            name, f"{one['heldout_loss']:.4f}", f"{one['spread']:.4f}", f"{100 * one['kept_fraction']:.1f} %", *sizes
        )
    Console().print(table)


if __name__ == "__main__":
    main()
