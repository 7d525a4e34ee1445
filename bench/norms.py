"""What it is worth to train the norms beside the factors (``lora.modules_to_save=[norms]``), at equal bytes.

    python -m bench.norms [--seeds 3] [--rounds 12] [--bits 0.5,0.1] [--json OUT] [key=value ...]

Dense runs without and with the norms, and runs coded both ways at every rate: those with the norms at so much lower a
rate that a payload has as many bytes. The embedded task and model unless settings say otherwise; on SmolLM2 and text
that really differs, once ``python -m bench.demo_real`` has written it:
``python -m bench.norms --rounds 8 --seeds 2 +experiment=demo_real task.path=outputs/demo-real/text``.
All are runs that a user would start; one that was made before is not made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.arms import parsed, parser_of, run_arm
from bench.programs import TAKEN_UP_AGAIN, ends_in_a_line, kept_fraction
from conf.output import open_output, provenance, write_json

WITH_NORMS = "lora.modules_to_save=[norms]"
OUTPUT = "outputs/norms"


def main() -> None:
    parser = parser_of(__doc__, OUTPUT, rounds=12)
    parser.add_argument("--bits", default="0.5,0.1", help="a parameter, both ways (default 0.5,0.1)")
    args = parsed(parser)
    runs: dict[str, list[dict[str, Any]]] = {}
    with ends_in_a_line(TAKEN_UP_AGAIN):
        rates = [float(bits) for bits in args.bits.split(",")]
        for seed in range(args.seeds):
            output = open_output(args.output.absolute() / f"seed-{seed}")
            own = [f"seed={seed}", f"federation.rounds={args.rounds}", "backend=inprocess", *args.overrides]
            dense: dict[str, Any] = {}
            for name, settings in arms(rates, dense):
                result = run_arm(name, output, [*own, *settings])
                dense.setdefault(name, result)
                runs.setdefault(name, []).append(figures_of(result, dense["dense"]))
            means = {name: mean_of(each) for name, each in runs.items()}
            if args.json is not None:
                about = {"rounds": args.rounds, "seeds": seed + 1, "settings": args.overrides}
                write_json({"runs": runs, "means": means, **about, "made_with": provenance()}, args.json)
    print_table(means)


def arms(rates: Sequence[float], results: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Names and settings; after each its results are to lie in ``results``, from which the rates of the next come."""
    yield "dense", ["arm=dense"]
    yield "dense, norms", ["arm=dense", WITH_NORMS]
    share = results["dense"]["num_parameters"] / results["dense, norms"]["num_parameters"]
    for bits in rates:
        yield f"{bits:g} bit", _coded(bits)
        yield f"{bits:g} bit, norms", [*_coded(bits * share), WITH_NORMS]


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
    spread = stdev(losses) if len(losses) > 1 else 0.0
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
