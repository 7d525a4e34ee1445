"""Results of runs that never were, for what reads results: reports and comparisons."""

from __future__ import annotations

import random

from conf import CHECKOUT
from conf.schema import Settings
from server.records.results import NodeRefusal, RunResults
from strategies.outcomes import ABSENT, FAILED, REFUSED, Downlink, Fault, Uplink

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"
NUM_PARAMETERS = 49_152


def standard_settings() -> Settings:
    """As if nobody had set any."""
    settings = Settings()
    settings.model.path = str(CHECKOUT / settings.model.path)
    settings.train.update, settings.train.lr, settings.strategy.lr = "delta", 0.005, 1.3
    return settings


def pretended_results(seed: int = 0, *, rounds: int = 4, clients: int = 6, bits: float = 0.5) -> RunResults:
    """A coded run with a fault of each kind, and with texts in it that want to be more than texts."""
    draw = random.Random(seed)
    settings = standard_settings()
    settings.seed, settings.codec.bits, settings.run_id = seed, bits, HOSTILE
    settings.federation.rounds, settings.federation.num_clients = rounds, clients
    settings.federation.clients_per_round = clients
    results = RunResults(settings, NUM_PARAMETERS, [3.614])
    size = round(NUM_PARAMETERS * bits / 8)
    faults = {(1, 0): (ABSENT, "its node is not connected"), (2, 1): (FAILED, HOSTILE), (3, 2): (REFUSED, "too long")}
    for number in range(1, rounds + 1):
        results.heldout_loss.append(3.2 + 0.4 * 0.7**number - bits / 100 + draw.uniform(-0.001, 0.001))
        for client in range(clients):
            results.downlinks.append(Downlink(number, client, size, catch_up_bytes=7 * (number == 2)))
            if (number, client) in faults:
                kind, reason = faults[number, client]
                results.faults.append(Fault(number, client, reason, kind, 5))
                continue
            loss = 3.3 - 0.05 * number + 0.01 * client
            results.uplinks.append(
                Uplink(number, client, size + client, "digest", loss, 2.0, 0.25, 0.5, 1.0, 0.125, num_examples=80)
            )
        results.delivery_bytes.append(clients * size)
    results.seconds = 60.0
    results.refused_nodes = [NodeRefusal(2**62 + 5, HOSTILE)]
    return results
