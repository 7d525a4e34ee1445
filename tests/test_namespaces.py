"""A deployment over hosts of their own: network namespaces with different addresses, and a wire that is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_faults import Run

from bench.deployment import Deployment, deployment_on_hosts
from bench.namespaces import Namespaces
from server.records.events import EventReader, read_status

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


ROUNDS = 12
"""Long enough for the node to come back: Flower takes it off its list after 46 s and lets it in again later."""
LONGER = [f"federation.rounds={ROUNDS}", "federation.max_failures=100"]


def test_a_network_that_is_cut_for_a_minute_costs_replies_and_no_round(
    hosts: Namespaces, place: Deployment, tmp_path: Path
) -> None:
    """Server and nodes have addresses of their own. The rounds go on without the node, which comes back by itself."""
    run = Run(place, tmp_path, *LONGER, prefix=hosts.in_server([]))
    run.wait_for("round_started", 2)
    hosts.cut(0, 60)
    losses = run.losses()
    assert len(losses) == ROUNDS + 1
    assert losses[-1] < losses[1] < losses[0]
    status = read_status(tmp_path)
    assert 1 <= status.faults < ROUNDS - 2
    assert status.uplinks == 2 * ROUNDS - status.faults
    events = EventReader(tmp_path).new()
    came = [e["partition"] for e in events if e["event"] == "uplink" and e["server_round"] == ROUNDS]
    assert sorted(came) == [0, 1]
    print(f"{status.faults} of {2 * ROUNDS} replies lost")
