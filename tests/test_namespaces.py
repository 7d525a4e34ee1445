"""A deployment over hosts of their own: network namespaces with different addresses, and a wire that is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_faults import Run

from bench.deployment import Deployment, deployment_on_hosts
from bench.namespaces import Namespaces
from server.events import read_status

pytestmark = [pytest.mark.grpc, pytest.mark.timeout(900)]
NUM_NODES = 2


@pytest.fixture(scope="module")
def hosts() -> Iterator[Namespaces]:
    try:
        with Namespaces(NUM_NODES) as found:
            yield found
    except ValueError as error:
        pytest.skip(f"no network namespaces here: {error}")


@pytest.fixture(scope="module")
def place(hosts: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment_on_hosts(tmp_path_factory.mktemp("hosts") / "server", NUM_NODES, hosts) as running:
        yield running


ROUNDS = 14
"""Long enough for the node to come back: Flower takes it off its list after 46 s and lets it in again later."""


def test_a_network_that_is_cut_for_a_minute_costs_replies_and_no_round(
    hosts: Namespaces, place: Deployment, tmp_path: Path
) -> None:
    """Server and nodes have addresses of their own. The rounds go on without the node, which comes back by itself."""
    longer = f"federation.rounds={ROUNDS}"
    undisturbed = Run(place, tmp_path / "undisturbed", longer, prefix=hosts.in_server([])).losses()
    run = Run(place, tmp_path / "cut", longer, "federation.max_failures=100", prefix=hosts.in_server([]))
    run.wait_for("round_started", 2)
    hosts.cut(0, 60)
    losses = run.losses()
    assert losses[:2] == undisturbed[:2]
    assert len(losses) == ROUNDS + 1
    status = read_status(tmp_path / "cut")
    assert 1 <= status.faults < ROUNDS - 2
    assert status.uplinks == 2 * ROUNDS - status.faults
    assert losses[-1] < undisturbed[-1] + 0.3 * (undisturbed[0] - undisturbed[-1])
    print(f"{status.faults} of {2 * ROUNDS} replies lost, loss {losses[-1]:.3f} beside {undisturbed[-1]:.3f}")
