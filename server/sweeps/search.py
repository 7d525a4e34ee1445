"""What a sweeper that searches is told of a run: the number, or numbers, that it makes as small as it can."""

from __future__ import annotations

import math

from conf.schema import Settings
from server.records.results import RunResults


def objective(settings: Settings, results: RunResults) -> float | list[float]:
    """By ``search.objective``.

    ``loss``: the final held-out loss. ``loss_and_bytes``: that and the bytes of the whole run, both ways. ``bytes``:
    these bytes if the loss is at most ``search.target_loss``; else what the run takes uncoded, times one more than the
    nats above it, so that a run which misses the loss is worse than any that keeps it, and the worse the further off.
    """
    total, loss = results.account().total, math.nan if results.final_loss is None else results.final_loss
    if settings.search.objective == "loss_and_bytes":
        return [loss, float(total)]
    target = settings.search.target_loss
    if settings.search.objective == "loss" or target is None:
        return loss
    return float(total) if loss <= target else uncoded_bytes(results) * (1 + loss - target)


def uncoded_bytes(results: RunResults) -> float:
    """Of a run in which every adapter and every update travels as float32, at least those that it took."""
    federation = results.settings.federation
    adapters = 2 * federation.clients_per_round * federation.rounds + federation.num_clients
    return float(max(4 * results.num_parameters * adapters, results.account().total))
