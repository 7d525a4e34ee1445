"""Zeroth-order federated fine-tuning beside a dense run: seeds and scalars travel, and nothing else.

    python -m bench.zeroth --beside outputs/both-ways/seed-0/dense [--rounds 400] [--lr 0.003,0.03] [--json OUT]

DeComFL (Li et al. 2024) and FedKSeed (Qin et al. 2023) on the LoRA parameters: in every round each client says how its
loss changes along random directions that all draw from a seed, one number a direction; the server sends the means back,
and all take the same step. Clients, data and the held-out loss are the dense run's, whose settings are read from its
results.json. Counted are four bytes a direction up for each client of a round, and four down for every client,
which must follow every step sooner or later.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from adapters.base import load_tokenizer
from adapters.model import load_model
from adapters.windows import Windows, next_token_loss
from bench.programs import ends_in_a_line, kept_fraction
from conf.output import provenance, write_json
from conf.schema import Settings
from strategies.sampling import Sampling
from tasks.shards import load_shards
from tasks.windows import heldout_loss

SCALAR_BYTES = 4
LOOKS = 20
"""How often the held-out loss is looked at."""


@dataclass(frozen=True)
class Recipe:
    """``lr`` times the mean slope along a direction is the step along it; ``reach``: how far its ends lie apart."""

    rounds: int
    lr: float
    directions: int
    reach: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, required=True, metavar="RUN", help="output folder of a dense run")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--lr", default="0.003", help="learning rates, one run each")
    parser.add_argument("--directions", type=int, default=1, help="a round (default 1)")
    parser.add_argument("--reach", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    with ends_in_a_line(also=(OSError, KeyError)):
        dense = json.loads((args.beside / "results.json").read_text())
        recipes = [Recipe(args.rounds, float(lr), args.directions, args.reach) for lr in args.lr.split(",")]
        rows = [run(dense, recipe) for recipe in recipes]
    print_rows(rows, dense)
    if args.json is not None:
        write_json({"rows": rows, "seed": dense["seed"], "made_with": provenance()}, args.json)


def run(dense: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """One federation. Raises ValueError: the dense run's data or model are not here any more."""
    settings = Settings.from_json(json.dumps(dense["settings"]))
    torch.set_num_threads(settings.train.threads)
    federation, num_clients = settings.federation, settings.federation.num_clients
    shards = list(load_shards(settings.task, load_tokenizer(settings.model), range(num_clients), num_clients))
    heldout = Windows.cat([shard.heldout for shard in shards])
    model = load_model(settings.model, settings.lora, settings.seed).eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sampling = Sampling(num_clients, federation.clients_per_round, settings.seed)
    looks = max(1, recipe.rounds // LOOKS)
    losses, working = {0: heldout_loss(model, heldout)}, 0.0
    with torch.no_grad(), Progress(console=Console(stderr=True), transient=True) as progress:
        for number in progress.track(range(1, recipe.rounds + 1), description=f"lr {recipe.lr:g}"):
            started = time.perf_counter()
            asked, size = sampling.sample(number), settings.train.batch_size
            drawn = (_batch(shards[client].train, size, [settings.seed, number, client]) for client in asked)
            batches = [batch.to(model.device) for batch in drawn]
            steps = []
            for direction in range(recipe.directions):
                which = number * recipe.directions + direction
                steps.append((which, _mean_slope(model, parameters, which, recipe.reach, batches)))
            for which, slope in steps:
                _move(parameters, which, -recipe.lr * slope / recipe.directions)
            working += time.perf_counter() - started
            if number % looks == 0 or number == recipe.rounds:
                losses[number] = heldout_loss(model, heldout)
    up = SCALAR_BYTES * recipe.directions * recipe.rounds * federation.clients_per_round
    down = SCALAR_BYTES * recipe.directions * recipe.rounds * num_clients
    base, goal = dense["heldout_loss"][0], dense["heldout_loss"][-1]
    final = [*losses.values()][-1]
    return {
        "lr": recipe.lr,
        "directions": recipe.directions,
        "rounds": recipe.rounds,
        "heldout_loss": losses,
        "kept": kept_fraction(base, goal, final),
        "bytes": {"up": up, "down": down, "total": up + down},
        "client_seconds": working,
    }


def _batch(windows: Windows, size: int, seed: Sequence[int]) -> Windows:
    picked = np.random.default_rng(seed).integers(len(windows), size=size)
    return windows[torch.from_numpy(picked)].trimmed()


def _mean_slope(
    model: PeftModel, parameters: Sequence[Tensor], which: int, reach: float, batches: Sequence[Windows]
) -> float:
    """Of the clients' losses along a direction; the model is as before, but for rounding."""
    ends = []
    for distance in (reach, -2 * reach):
        _move(parameters, which, distance)
        ends.append(mean(float(next_token_loss(model, batch)) for batch in batches))
    _move(parameters, which, reach)
    return (ends[0] - ends[1]) / (2 * reach)


def _move(parameters: Sequence[Tensor], which: int, distance: float) -> None:
    """Along one random direction, the same on every end."""
    generator = torch.Generator().manual_seed(which)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=distance)


def print_rows(rows: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    """One line a learning rate, beside the dense run."""
    table = Table(title=f"zeroth order beside {len(dense['heldout_loss']) - 1} rounds of dense, seed {dense['seed']}")
    for column in ("lr", "rounds", "held-out loss", "kept", "bytes in all", "of dense's", "clients' seconds"):
        table.add_column(column, justify="right")
    trained = sum(one["seconds_train"] for one in dense["uplinks"])
    total = dense["bytes"]["total"]
    lines = [("dense", len(dense["heldout_loss"]) - 1, dense["heldout_loss"][-1], 1.0, total, trained)]
    for row in rows:
        final = [*row["heldout_loss"].values()][-1]
        lines.append(
            (f"{row['lr']:g}", row["rounds"], final, row["kept"], row["bytes"]["total"], row["client_seconds"])
        )
    for name, rounds, loss, kept, size, seconds in lines:
        share = f"1/{total / size:,.0f}"
        table.add_row(name, f"{rounds:,}", f"{loss:.4f}", f"{100 * kept:.1f} %", f"{size:,}", share, f"{seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    main()
