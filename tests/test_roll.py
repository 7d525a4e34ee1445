"""The roll call on a grid of nodes that answer as they please; no model, no ClientApp."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from conftest import InProcessGrid
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from strategies.errors import FederationError
from strategies.outcomes import Downlink, Fault, Uplink
from strategies.roll import Roll, call_roll
from strategies.wire import CONFIG, METRICS, PARTITION, REFUSAL

Answer = Callable[[Message], Message | None]


class Nodes(InProcessGrid):
    """Node id -> how it answers. Nodes may be added and taken away at any time."""

    def __init__(self, answers: dict[int, Answer]) -> None:
        super().__init__(ClientApp(), 0)
        self.answers = answers

    def get_node_ids(self) -> Iterable[int]:
        return list(self.answers)

    def answer(self, message: Message) -> Message | None:
        return self.answers[message.metadata.dst_node_id](message)


class Watcher:
    def __init__(self) -> None:
        self.refused: dict[int, str] = {}

    def uplink(self, uplink: Uplink) -> None: ...

    def downlink(self, downlink: Downlink) -> None: ...

    def fault(self, fault: Fault) -> None: ...

    def node_refused(self, node: int, reason: str) -> None:
        self.refused[node] = reason


def holds(partition: float, refusal: str = "") -> Answer:
    def answer(message: Message) -> Message:
        content = RecordDict({METRICS: MetricRecord({PARTITION: partition}), CONFIG: ConfigRecord({REFUSAL: refusal})})
        return Message(content, reply_to=message)

    return answer


def fails(reason: str) -> Answer:
    return lambda message: Message(Error(5, reason), reply_to=message)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.roll.AGAIN_SECONDS", 0.0)
    monkeypatch.setattr("strategies.roll.POLL_SECONDS", 0.001)


def roll_of(nodes: Nodes, num: int, bound: dict[int, int] | None = None) -> tuple[Roll, Watcher]:
    watcher = Watcher()
    return Roll(nodes, num, ConfigRecord(), watcher, 0.2, bound), watcher


def test_everybody_gets_the_partition_that_it_holds() -> None:
    roll, watcher = roll_of(Nodes({7: holds(1), 9: holds(0), 11: holds(5)}), 2)  # 11 is of a larger federation
    assert call_roll(roll) == {0: 9, 1: 7}
    assert not watcher.refused


def test_a_bound_liar_is_refused_by_name_and_the_others_go_on() -> None:
    roll, watcher = roll_of(Nodes({7: holds(0), 8: holds(0), 9: holds(2)}), 3, {7: 0, 8: 1, 9: 2})
    assert call_roll(roll) == {0: 7, 2: 9}
    assert watcher.refused == {8: "claims partition 0, but its key is bound to partition 1"}


def test_a_node_whose_key_is_bound_to_nothing_holds_nothing() -> None:
    roll, watcher = roll_of(Nodes({7: holds(0), 66: holds(0)}), 1, {7: 0})
    assert call_roll(roll) == {0: 7}
    assert list(watcher.refused) in ([], [66])
    roll.update()
    assert "bound to none" in watcher.refused[66]


def test_of_two_that_claim_one_partition_none_gets_it_and_the_others_go_on() -> None:
    roll, watcher = roll_of(Nodes({7: holds(0), 8: holds(0), 9: holds(2)}), 3)
    assert call_roll(roll) == {2: 9}
    assert watcher.refused.keys() == {7, 8}
    assert "two nodes hold partition 0" in watcher.refused[7]


def test_who_holds_a_partition_keeps_it_while_it_is_connected() -> None:
    nodes = Nodes({7: holds(0)})
    roll, watcher = roll_of(nodes, 1)
    assert call_roll(roll) == {0: 7}
    nodes.answers[8] = holds(0)
    assert roll.update() == {0: 7}
    assert watcher.refused == {8: "claims partition 0, which node 7 holds"}
    del nodes.answers[7]
    assert roll.update() == {0: 8}, "a node that is back under another id"


def test_a_node_that_fails_first_is_asked_again() -> None:
    """As Flower answers for a node that was killed just before, and is back."""
    nodes = Nodes({7: holds(0), 8: holds(1)})
    tries: list[int] = []

    def third_time_lucky(message: Message) -> Message | None:
        tries.append(1)
        return (holds(1) if len(tries) > 2 else fails("Node Unavailable"))(message)

    nodes.answers[8] = third_time_lucky
    roll, watcher = roll_of(nodes, 2)
    assert call_roll(roll) == {0: 7, 1: 8}
    assert len(tries) == 3
    assert not watcher.refused


def test_a_node_that_comes_late_is_asked_too() -> None:
    nodes = Nodes({7: holds(0)})
    roll, _ = roll_of(nodes, 2)
    waited: list[int] = []

    def one_more(num_nodes: int) -> None:
        waited.append(num_nodes)
        nodes.answers[8] = holds(1)

    assert call_roll(roll, one_more) == {0: 7, 1: 8}
    assert waited == [1]


def test_a_node_that_says_that_it_cannot_stops_the_start_unless_fewer_are_enough() -> None:
    nodes = Nodes({7: holds(0), 8: holds(1, "no model\x1b[2J here")})
    roll, _ = roll_of(nodes, 2)
    with pytest.raises(FederationError, match=r"1 of 2 missing\); node 8 cannot take part: no model here"):
        call_roll(roll)
    assert call_roll(roll, min_partitions=1) == {0: 7}
    nodes.answers[8] = holds(1)
    assert roll.update() == {0: 7, 1: 8}, "who was refused is asked again"


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda message: Message(RecordDict(), reply_to=message),
        lambda message: Message(RecordDict({METRICS: MetricRecord({PARTITION: [1, 2]})}), reply_to=message),
        holds(float("nan")),
        holds(float("inf")),
    ],
)
def test_an_answer_that_cannot_be_read_does_not_stop_the_others(nonsense: Answer) -> None:
    roll, watcher = roll_of(Nodes({7: holds(0), 8: nonsense}), 2)
    assert call_roll(roll) == {0: 7}
    assert "no answer that can be read" in watcher.refused[8]


def test_silence_is_waited_for_and_then_said() -> None:
    roll, _ = roll_of(Nodes({7: holds(0), 8: lambda message: None}), 2)
    with pytest.raises(FederationError, match=r"did not answer within 0 s.*federation\.wait_seconds"):
        call_roll(roll)
