"""Nodes that go and come back, over the strategies alone: adapters of a few numbers, no model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcessGrid
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from conf.schema import Settings
from server.records.results import RunResults
from strategies.broadcast import DenseBroadcaster
from strategies.build import build_inner
from strategies.dense import DenseReceiver
from strategies.errors import RoundError
from strategies.federated import FederatedStrategy, Limits, Ways
from strategies.messages import replies_to
from strategies.norms import NormBound
from strategies.outcomes import ABSENT, FAILED, REFUSED, Downlink, Fault, Uplink
from strategies.roll import Roll, call_roll
from strategies.sampling import Sampling
from strategies.settings import StrategySettings
from strategies.tensors import from_record, to_record
from strategies.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    REFUSAL,
    REPLY_METRICS,
    SERVER_ROUND,
    unwrap_adapter,
    wrap_adapter,
)


class Nodes(InProcessGrid):
    """Node id -> partition, of those that are connected. They send the adapter plus one, each a little other."""

    def __init__(self, nodes: dict[int, int]) -> None:
        super().__init__(ClientApp(), 0)
        self.nodes = nodes
        self.errors: dict[int, Error] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        partition = self.nodes.get(node, -1)
        if message.metadata.message_type == "query":
            content = RecordDict({METRICS: MetricRecord({PARTITION: partition}), CONFIG: ConfigRecord({REFUSAL: ""})})
            return Message(content, reply_to=message)
        if node in self.errors:
            return Message(self.errors[node], reply_to=message)
        server_round = int(str(message.content.config_records[CONFIG][SERVER_ROUND]))
        metrics: dict[str, Any] = dict.fromkeys(REPLY_METRICS, 1.0)
        metrics |= {NUM_EXAMPLES: 4, PARTITION: partition, SERVER_ROUND: server_round}
        adapter = {name: a + np.float32(1 + 0.01 * partition) for name, a in unwrap_adapter(message.content).items()}
        return Message(RecordDict({ARRAYS: wrap_adapter(adapter), METRICS: MetricRecord(metrics)}), reply_to=message)


class Rounds:
    """A run's loop without model and disk; the observer of its strategy."""

    def __init__(self, grid: Nodes, num_clients: int, **limits: Any) -> None:
        self.grid = grid
        self.results = RunResults(Settings())
        self.refused: dict[int, str] = {}
        self.adapter: dict[str, Tensor] = {"a": torch.zeros(2, 3)}
        self.done = 0
        roll = Roll(grid, num_clients, ConfigRecord(), self, 1.0)
        self.strategy = FederatedStrategy(
            build_inner(StrategySettings()),
            Ways(DenseBroadcaster(), DenseReceiver()),
            roll,
            Sampling(num_clients, num_clients, 0, max_failures=2, rest_rounds=2),
            NormBound(3, 10),
            self,
            Limits(max_examples=10, wait_seconds=0.05, **limits),
        )
        call_roll(roll)

    def round(self) -> list[int]:
        """The partitions that took part."""
        self.done += 1
        messages = list(self.strategy.configure_train(self.done, to_record(self.adapter), ConfigRecord(), self.grid))
        arrays, _ = self.strategy.aggregate_train(self.done, replies_to(self.grid, messages, 0.2))
        assert arrays is not None
        self.adapter = from_record(arrays)
        self.results.uplinks += self.strategy.uplinks
        return [uplink.partition for uplink in self.strategy.uplinks]

    def uplink(self, uplink: Uplink) -> None: ...

    def downlink(self, downlink: Downlink) -> None: ...

    def fault(self, fault: Fault) -> None:
        self.results.faults.append(fault)

    def node_refused(self, node: int, reason: str) -> None:
        self.refused[node] = reason


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("strategies.roll.POLL_SECONDS", "strategies.federated.POLL_SECONDS"):
        monkeypatch.setattr(name, 0.001)
    monkeypatch.setattr("strategies.roll.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("strategies.federated.RETURN_SECONDS", 0.01)


def test_a_node_away_for_three_rounds_takes_part_in_the_round_after_it_is_back() -> None:
    grid = Nodes({7: 0, 8: 1, 9: 2})
    rounds = Rounds(grid, 3)
    assert rounds.round() == [0, 1, 2]
    del grid.nodes[8]
    assert [rounds.round() for _ in range(3)] == [[0, 2]] * 3
    grid.nodes[8] = 1
    assert rounds.round() == [0, 1, 2]
    assert [(fault.server_round, fault.partition, fault.kind) for fault in rounds.results.faults] == [
        (r, 1, ABSENT) for r in (2, 3, 4)
    ]
    facts = rounds.results._who_took_part()
    assert facts["took part"] == "12 of 15 replies asked for, of 3 clients"
    assert facts["took part in less"] == "client 1 in 2 of 5 rounds (3 absent)"
    assert facts["left out because"] == "its node is not connected (3)"


def test_a_node_that_is_back_under_another_id_is_found() -> None:
    grid = Nodes({7: 0, 8: 1})
    rounds = Rounds(grid, 2)
    del grid.nodes[8]
    assert rounds.round() == [0]
    grid.nodes[88] = 1
    assert rounds.round() == [0, 1]


def test_a_node_that_dies_in_a_round_is_absent_and_not_punished() -> None:
    grid = Nodes({7: 0, 8: 1})
    rounds = Rounds(grid, 2)
    grid.errors[8] = Error(5, "Node Unavailable")
    assert [rounds.round() for _ in range(4)] == [[0]] * 4
    assert {fault.kind for fault in rounds.results.faults} == {ABSENT}
    grid.errors.clear()
    assert rounds.round() == [0, 1]


def test_a_client_that_fails_twice_in_a_row_rests() -> None:
    grid = Nodes({7: 0, 8: 1})
    rounds = Rounds(grid, 2)
    grid.errors[8] = Error(2, "CUDA out of memory")
    assert [rounds.round() for _ in range(2)] == [[0]] * 2
    assert "failed 2 times in a row and rests for 2 rounds" in rounds.results.faults[-1].reason
    grid.errors.clear()
    assert [rounds.round() for _ in range(3)] == [[0], [0], [0, 1]]
    assert rounds.results.participation()[1] == {"asked": 3, "accepted": 1, ABSENT: 0, FAILED: 2, REFUSED: 0}


def test_a_node_that_changed_its_partition_is_asked_again() -> None:
    grid = Nodes({7: 0, 8: 1})
    rounds = Rounds(grid, 2)
    grid.nodes[8] = 0
    assert rounds.round() == [0]
    assert "answers for partition 0" in rounds.results.faults[-1].reason
    assert rounds.round() == [0]
    assert rounds.refused == {8: "claims partition 0, which node 7 holds"}


def test_a_round_that_comes_to_nothing_changes_nothing() -> None:
    grid = Nodes({7: 0, 8: 1})
    rounds = Rounds(grid, 2, min_replies=2)
    rounds.round()
    before = rounds.strategy.state()
    del grid.nodes[8]
    with pytest.raises(RoundError, match="1 usable replies"):
        rounds.round()
    assert rounds.strategy.state() == before


def test_the_state_of_the_strategies_is_given_back() -> None:
    grid = Nodes({7: 0, 8: 1, 9: 2})
    rounds, other = Rounds(grid, 3), Rounds(grid, 3)
    grid.errors[8] = Error(2, "failed")
    rounds.round()
    other.strategy.load_state(rounds.strategy.state())
    assert other.strategy.state() == rounds.strategy.state()
    assert other.strategy.sampling.failures == {1: 1}
    broken = rounds.strategy.state()
    broken.values["sampling"]["failures"] = [["1", 1]]
    with pytest.raises(ValueError, match="pairs of int"):
        other.strategy.load_state(broken)


def test_memory_of_held_replies_does_not_grow_with_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twenty replies the ninth is used before the tenth is asked for."""
    grid = Nodes({100 + i: i for i in range(20)})
    rounds = Rounds(grid, 20)
    pulled: list[int] = []
    messages = list(rounds.strategy.configure_train(1, to_record(rounds.adapter), ConfigRecord(), grid))

    sent = replies_to(grid, messages, 0.2)

    def replies() -> Iterable[Message]:
        for reply in sent:
            pulled.append(len(used))
            yield reply

    used: list[Uplink] = []
    monkeypatch.setattr(rounds, "uplink", used.append)
    rounds.strategy.aggregate_train(1, replies())
    assert len(used) == 20
    assert max(position - count for position, count in enumerate(pulled)) <= 9
