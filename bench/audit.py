"""How much a canary can be told apart by, beside what is promised: a lower bound on epsilon for what really runs.

    python -m bench.audit [--trials 20000] [--passes 1000] [--json OUT]

The strongest attack that the promise allows for: the attacker chooses the data and sees the answer. Whether a canary
was in them is guessed from the answer's component along the canary's own direction; the threshold is chosen on half of
the trials, with the canary and without it, and judged on the others. The rates of right and wrong guesses, at their
pessimistic ends (Clopper and Pearson 1934), bound from below how Gaussian-private the mechanism is, and so its epsilon
(Nasr et al. 2023, "Tight Auditing of Differentially Private Machine Learning", section 4): that must stay below the
stated one, and a mechanism with half of the noise must be found out. Client level: an update as long as the clip, or
none. Record level: one training window alone, or none, through DP-SGD on the embedded model.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from adapters.model import Adapter, get_adapter, load_model
from adapters.private import Protection, finetune_privately
from adapters.settings import LoraSettings, ModelSettings, TrainSettings
from adapters.windows import Windows
from conf.output import provenance, write_json
from privacy.accounting import Release, epsilon_of, noise_for
from privacy.mechanism import clipped, noised
from privacy.normal import normals
from privacy.stream import Stream

EPSILONS = (0.25, 2.0, 8.0)
DELTA = 1e-5
CONFIDENCE = 0.95
SIZE = 64
"""Values of an update at client level: more of them change nothing, as the canary has one direction."""

Floats = NDArray[np.float64]
Answers = Callable[[float, bool, int], Floats]
"""Noise multiplier, whether the canary is in, how many trials -> scores: higher where it looks to be in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000, help="at client level, with the canary and without it")
    parser.add_argument("--passes", type=int, default=1000, help="the same at record level, each a training")
    parser.add_argument("--seed", type=int, help="of the noise; default: none, as in a run")
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the figures")
    args = parser.parse_args()
    if min(args.trials, args.passes) < 20:
        parser.error("at least 20 trials: of fewer nothing follows")
    torch.set_num_threads(1)
    stream = Stream.fresh() if args.seed is None else Stream(args.seed.to_bytes(32, "little"))
    found = audits({"client": args.trials, "record": args.passes}, stream)
    print_table(found)
    if args.json is not None:
        write_json(
            {"trials": args.trials, "passes": args.passes, "delta": DELTA, "audits": found, "made_with": provenance()},
            args.json,
        )
    if not all(one["lower_bound"] <= one["stated"] for one in found if not one["broken"]):
        sys.exit("a mechanism gives away more than it states")


def audits(trials: dict[str, int], stream: Stream) -> list[dict[str, Any]]:
    """Every mechanism at every epsilon, and with half of its noise, in so many trials of its level."""
    levels: dict[str, Answers] = {"client": client_level(stream), "record": record_level(stream)}
    found = []
    for level, answers in levels.items():
        for epsilon in EPSILONS:
            noise = noise_for(epsilon, DELTA, 1)
            for broken in (False, True):
                used = noise / 2 if broken else noise
                bound = audited(answers(used, True, trials[level]), answers(used, False, trials[level]))
                found.append({"level": level, "stated": epsilon, "broken": broken, "noise": used, "lower_bound": bound})
    return found


def client_level(stream: Stream) -> Answers:
    """The Gaussian mechanism on a whole update."""
    canary = {"update": torch.ones(SIZE) * 100}
    nothing = {"update": torch.zeros(SIZE)}

    def answers(noise: float, there: bool, trials: int) -> Floats:
        bounded = clipped(canary if there else nothing, 1.0)
        released = (
            noised(bounded, noise, lambda shape: torch.from_numpy(normals(tuple(shape), stream)).float())["update"]
            for _ in range(trials)
        )
        return np.array([float(one.sum()) / math.sqrt(SIZE) for one in released])

    return answers


def record_level(stream: Stream) -> Answers:
    """DP-SGD, one step over one window that may be there or not, on the embedded model with an adapter of rank 1."""
    model = load_model(ModelSettings(path="assets/tiny-llama"), LoraSettings(rank=1, target_modules=["q_proj"]), seed=0)
    start = {name: tensor.clone() for name, tensor in get_adapter(model).items()}
    window = Windows.whole(torch.arange(5, 37)[None])
    settings = TrainSettings(update="gradient", steps=1, batch_size=1, micro_batch_size=1, lr=1.0, clip=1e9)

    def once(noise: float, there: bool) -> Adapter:
        protection = Protection(
            clip=1e-3,  # far below the gradient's norm: the canary is as long as it may be
            noise_multiplier=noise,
            uniforms=lambda count: torch.full((count,), 0.0 if there else 2.0, dtype=torch.float64),
            normals=lambda shape: torch.from_numpy(normals(tuple(shape), stream)).float(),
            one_by_one=True,
        )
        return finetune_privately(model, start, window, settings, protection, 0)[0]

    direction = flat(once(0.0, True))
    direction /= direction.norm()

    def answers(noise: float, there: bool, trials: int) -> Floats:
        return np.array([float(flat(once(noise, there)) @ direction) for _ in range(trials)])

    return answers


def flat(update: Adapter) -> torch.Tensor:
    """All values of an update in a row, in float64."""
    return torch.cat([tensor.flatten().double() for tensor in update.values()])


def audited(inside: Floats, outside: Floats) -> float:
    """A lower bound on epsilon from scores of trials with the canary and without it, half of each to choose by."""
    half = len(inside) // 2
    cuts = np.quantile(np.concatenate([inside[:half], outside[:half]]), np.linspace(0.02, 0.98, 97))
    chosen = max(cuts, key=lambda cut: _bound_at(cut, inside[:half], outside[:half]))
    return _bound_at(chosen, inside[half:], outside[half:])


def _bound_at(cut: float, inside: Floats, outside: Floats) -> float:
    return lower_bound(int((inside > cut).sum()), len(inside), int((outside > cut).sum()), len(outside))


def lower_bound(right: int, of: int, wrong: int, among: int, delta: float = DELTA) -> float:
    """The epsilon that a Gaussian mechanism has at least, at ``CONFIDENCE``, of which so many guesses were right and
    wrong; at least 0."""
    tail = (1 - CONFIDENCE) / 2
    least_right = stats.beta.ppf(tail, right, of - right + 1) if right else 0.0
    most_wrong = stats.beta.ppf(1 - tail, wrong + 1, among - wrong) if wrong < among else 1.0
    apart = float(stats.norm.ppf(least_right) - stats.norm.ppf(most_wrong))  # of two unit Gaussians' means
    return epsilon_of(Release(1 / apart), 1, delta) if apart > 1e-3 else 0.0


def print_table(found: Sequence[dict[str, Any]]) -> None:
    table = Table(title="what a canary shows, beside what is stated")
    for column in ("level", "stated epsilon", "noise", "at least", ""):
        table.add_column(column, justify="left" if column in ("level", "") else "right")
    for one in found:
        said = "half of the noise, on purpose" if one["broken"] else "holds"
        if one["lower_bound"] > one["stated"]:
            said = "found out" if one["broken"] else "DOES NOT HOLD"
        table.add_row(one["level"], f"{one['stated']:g}", f"{one['noise']:.3f}", f"{one['lower_bound']:.3f}", said)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
