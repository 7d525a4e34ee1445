"""Clients that train other ranks or send other rates than those beside them, in one round, beside uniform runs.

    python -m bench.uneven [--seeds 3] [--rounds 6] [--json OUT] [key=value ...]

Nine clients of the embedded task, six a round, an adapter of rank 16. *Ranks*: a third of the clients trains rank 4, a
third 8, a third 16, beside runs in which all train 4, or 16, uncoded and coded both ways at half a bit; and beside a
run of rank 16 that takes the mixed run's bytes at a lower rate. *Rates*: a third sends 0.1, a third 0.3, a third 1 bit
a parameter, beside runs in which all send the lowest, the highest, or the mean, which is as many bytes. All are runs
that a user would start; one that was made before is not made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.arms import over_seeds, parsed, parser_of, run_arm
from bench.programs import spread_of

RANKS, RATES, BITS = (4, 8, 16), (0.1, 0.3, 1.0), 0.5
COMMON = ("backend=inprocess", "lora.rank=16", "federation.num_clients=9", "federation.clients_per_round=6")
OUTPUT = "outputs/uneven"


def main() -> None:
    args = parsed(parser_of(__doc__, OUTPUT, rounds=6))

    def run_seed(output: Path, own: list[str]) -> dict[str, dict[str, Any]]:
        common = [*own, *COMMON, *args.overrides]
        return {name: figures_of(run_arm(name, output, [*common, *settings])) for name, settings in arms().items()}

    print_table(over_seeds(args, run_seed, mean_of))


def arms() -> dict[str, list[str]]:
    """Name -> settings."""
    coded = ["arm=coded", f"codec.bits={BITS}", f"codec.down_bits={BITS}"]
    mixed = f"federation.client_ranks=[{','.join(map(str, RANKS))}]"
    as_many = BITS * mean(RANKS) / max(RANKS)
    found = {}
    for name, way in (("dense", ["arm=dense"]), ("coded", coded)):
        found[f"{name}, all rank 4"] = [*way, "federation.client_ranks=[4]"]
        found[f"{name}, ranks 4, 8, 16"] = [*way, mixed]
        found[f"{name}, all rank 16"] = way
    found["coded, all rank 16, bytes of 4, 8, 16"] = [*coded, f"codec.bits={as_many:.4f}"]
    for bits in (min(RATES), mean(RATES), max(RATES)):
        found[f"all {bits:.3g} bit"] = [*coded, f"codec.bits={bits:.4f}"]
    rates = f"federation.client_bits=[{','.join(map(str, RATES))}]"
    found["0.1, 0.3, 1 bit"] = [*coded, f"codec.bits={max(RATES)}", rates]
    return found


def figures_of(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "heldout_loss": run["heldout_loss"],
        "bytes_up_per_client_round": run["uplink_payload_bytes_per_client_round"],
        "bytes_of_client": [one["payload_bytes"] for one in run["uplinks"][-6:]],
    }


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over seeds; the spread is the standard deviation."""
    losses = [run["heldout_loss"][-1] for run in runs]
    return {
        "heldout_loss": mean(losses),
        "spread": spread_of(losses),
        "bytes_up_per_client_round": mean(run["bytes_up_per_client_round"] for run in runs),
    }


def print_table(means: dict[str, dict[str, float]]) -> None:
    table = Table(title="held-out loss at the end, nats per token")
    for column in ("run", "loss", "spread", "bytes up per client and round"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, one in means.items():
        bytes_up = f"{one['bytes_up_per_client_round']:,.0f}"
        table.add_row(name, f"{one['heldout_loss']:.4f}", f"{one['spread']:.4f}", bytes_up)
    Console().print(table)


if __name__ == "__main__":
    main()
