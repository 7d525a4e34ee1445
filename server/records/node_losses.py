"""What nodes said of one adapter, put together: the loss over all their tokens, and how fair it is to each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

from strategies.outcomes import NodeLoss


@dataclass(frozen=True)
class FederatedLoss:
    """Of the adapter that came out of one round, 0: of the first one. ``answers`` is not empty."""

    server_round: int
    answers: tuple[NodeLoss, ...]  # by ascending partition
    before: Mapping[int, float]  # partition -> its loss before the first round, as far as it is known

    @property
    def loss(self) -> float:
        """Mean over all held-out tokens of those that answered, nats: what a server with their text would measure."""
        return sum(one.loss * one.tokens for one in self.answers) / sum(one.tokens for one in self.answers)

    @property
    def middle(self) -> float:
        """The median client's: what a minority that lies cannot move far."""
        return median(one.loss for one in self.answers)

    @property
    def worst(self) -> NodeLoss:
        return max(self.answers, key=lambda one: one.loss)

    @property
    def spread(self) -> float:
        """Standard deviation over clients, each counted alike."""
        mean = sum(one.loss for one in self.answers) / len(self.answers)
        return sqrt(sum((one.loss - mean) ** 2 for one in self.answers) / len(self.answers))

    @property
    def worse_than_before(self) -> float | None:
        """Share of the clients whose loss is above the one before the first round; None: of none it is known."""
        known = [one.loss > self.before[one.partition] for one in self.answers if one.partition in self.before]
        return sum(known) / len(known) if known else None

    def to_json(self) -> dict[str, Any]:
        return {
            "server_round": self.server_round,
            "loss": self.loss,
            "clients": len(self.answers),
            "tokens": sum(one.tokens for one in self.answers),
            "windows": sum(one.windows for one in self.answers),
            "median": self.middle,
            "best": min(one.loss for one in self.answers),
            "worst": self.worst.loss,
            "worst_client": self.worst.partition,
            "spread": self.spread,
            "worse_than_base": self.worse_than_before,
            "by_client": {str(one.partition): one.loss for one in self.answers},
        }


def federated_losses(answers: Iterable[NodeLoss]) -> list[FederatedLoss]:
    """By ascending round."""
    by_round: dict[int, dict[int, NodeLoss]] = {}
    for one in answers:
        by_round.setdefault(one.server_round, {})[one.partition] = one
    before = {partition: one.loss for partition, one in by_round.get(0, {}).items()}
    return [FederatedLoss(number, _sorted(by_round[number]), before) for number in sorted(by_round)]


def _sorted(answers: Mapping[int, NodeLoss]) -> tuple[NodeLoss, ...]:
    return tuple(answers[partition] for partition in sorted(answers))


def in_words(losses: Sequence[FederatedLoss]) -> dict[str, str]:
    """For a model card, label -> text."""
    if not losses:
        return {}
    first, last = losses[0], losses[-1]
    change = f"{first.loss:.4f} -> {last.loss:.4f}" if len(losses) > 1 else f"{last.loss:.4f}"
    where = f"{len(last.answers)} clients, {sum(one.tokens for one in last.answers):,} tokens"
    spread = f"worst {last.worst.loss:.4f} (client {last.worst.partition}), median {last.middle:.4f}"
    spread += f", standard deviation {last.spread:.4f}"
    if last.server_round and last.worse_than_before is not None:
        spread += f"; {last.worse_than_before:.0%} of the clients worse than before the first round"
    return {
        "loss on the nodes, nats per token": f"{change} after round {last.server_round}, {where}, by their own word",
        "loss on the nodes, by client": spread,
    }
