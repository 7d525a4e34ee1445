"""Who takes part: the roster of nodes, and a strategy that samples partitions with a seed.

Flower's node ids are random and its sampling is unseeded; partitions are numbered by the user. A roster maps the
one to the other, so that the same seed picks the same clients in every run and on every back end.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING
from types import SimpleNamespace
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log

from strategies.errors import FederationError, RoundError
from strategies.messages import replies_to
from strategies.records import (
    ARRAYS,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    PARTITION,
    REFUSAL,
    REPLY_METRICS,
    config_of,
    metric,
)
from strategies.wrapping import WrappingStrategy

Roster = Mapping[int, int]
"""Partition id -> Flower node id."""

RETURN_SECONDS = 20.0
"""Flower counts a node as gone 60 s after its last heartbeat, and one whose network was cut for 20 s may send none for
longer: they come every 22.5 s at most, and after a failure only when waits of 1, 2, 4, 8 and 16 s are over
(``python -m bench.heartbeats``)."""


def call_roll(
    grid: Grid,
    num_clients: int,
    config: ConfigRecord,
    wait_seconds: float,
    on_wait: Callable[[int], None] | None = None,
) -> dict[int, int]:
    """Waits for the nodes, asks each for its partition and lets it check that it can serve the run's settings.

    Args:
        config: sent to every node; holds the run's settings.
        wait_seconds: for the nodes to come, and again for their answers.
        on_wait: called with the number of nodes now and then while some are missing.

    Raises:
        FederationError: too few nodes in time, a node that cannot serve the settings, a partition twice or missing.
    """
    deadline = time.monotonic() + wait_seconds
    while len(nodes := sorted(grid.get_node_ids())) < num_clients:
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} of {num_clients} nodes came within {wait_seconds:.0f} s (federation.wait_seconds): "
                "start more nodes, or set federation.num_clients to what there is"
            )
        if on_wait is not None:
            on_wait(len(nodes))
        time.sleep(0.5)
    questions = [Message(RecordDict({CONFIG: config}), node, MessageType.QUERY) for node in nodes]
    roster: dict[int, int] = {}
    refusals: list[str] = []
    replies = replies_to(grid, questions, wait_seconds)
    asked = {question.metadata.message_id: question.metadata.dst_node_id for question in questions}
    for reply in replies:
        node = asked[reply.metadata.reply_to_message_id]
        try:
            partition = _answer(reply)
        except FederationError as error:
            refusals.append(f"node {node} {error}")
            continue
        if partition in roster:
            raise FederationError(f"two nodes hold partition {partition}: give each its own partition-id")
        roster[partition] = node
    if missing := sorted(set(range(num_clients)) - roster.keys()):
        if silent := len(asked) - len(roster) - len(refusals):
            refusals.append(
                f"{silent} of {len(asked)} nodes did not answer within {wait_seconds:.0f} s: if they are still loading "
                "the model, give them more with federation.wait_seconds"
            )
        reasons = "".join(f"; {refusal}" for refusal in refusals)
        raise FederationError(
            f"no node serves partition {missing[0]} ({len(missing)} of {num_clients} missing){reasons}"
        )
    return {partition: roster[partition] for partition in range(num_clients)}


def _answer(reply: Message) -> int:
    """The partition that a node serves. Raises FederationError: it does not, and why."""
    if reply.has_error():
        raise FederationError(f"failed: {reply.error.reason}")
    try:
        if refusal := config_of(reply.content).get(REFUSAL, ""):
            raise FederationError(f"cannot take part: {refusal!s}")
        return int(metric(reply.content.metric_records.get(METRICS, MetricRecord()), PARTITION))
    except FederationError:
        raise
    except (ValueError, OverflowError) as error:
        raise FederationError(f"gives no answer that can be read: {error}") from None


@dataclass(frozen=True)
class Fault:
    """A client that gave nothing usable in a round, and why."""

    server_round: int
    partition: int
    reason: str


class SeededStrategy(WrappingStrategy):
    """Samples partitions with a seed, and hands replies on in the order of partitions.

    Float sums depend on their order, so a fixed order makes the same seed give the same bits; a reply waits only for
    those before it. A client that fails ``max_failures`` times in a row is left out for ``rest_rounds`` rounds. Wraps
    any strategy that takes all the nodes it sees (``fraction_train=1``).
    """

    def __init__(
        self,
        inner: Strategy,
        roster: Roster,
        clients_per_round: int,
        seed: int,
        max_examples: int,
        max_failures: int = 3,
        rest_rounds: int = 5,
        wait_seconds: float = 180.0,
        on_fault: Callable[[Fault], None] | None = None,
    ) -> None:
        if not 1 <= clients_per_round <= len(roster):
            raise FederationError(
                f"federation.clients_per_round={clients_per_round} of {len(roster)} clients: choose 1 to {len(roster)}"
            )
        super().__init__(inner)
        self.roster = roster
        self.clients_per_round = clients_per_round
        self.seed = seed
        self.max_examples = max_examples  # a client's weight in the mean is its own word: this bounds it
        self.max_failures = max_failures
        self.rest_rounds = rest_rounds
        self.wait_seconds = wait_seconds  # for one of a round's nodes to be connected
        self.on_fault = on_fault
        self.failures: dict[int, int] = {}  # partition -> failures in a row
        self.resting: dict[int, int] = {}  # partition -> the last round that it is left out of
        self._partition_of = {node: partition for partition, node in roster.items()}
        self._messages: list[Message] = []
        self.refused: set[int] = set()  # partitions whose replies of this round the inner strategy could not use

    def sample(self, server_round: int) -> list[int]:
        """The partitions of a round, ascending; depends on seed, round and who rests. All rest: all are awake."""
        awake = [p for p in sorted(self.roster) if self.resting.get(p, 0) < server_round] or sorted(self.roster)
        order = random.Random(f"{self.seed}/{server_round}")
        return sorted(order.sample(awake, min(self.clients_per_round, len(awake))))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to those of the round's clients whose nodes are connected.

        Raises:
            RoundError: none of them was within ``wait_seconds``.
        """
        chosen = {self.roster[partition] for partition in self.sample(server_round)}
        present = self._connected(chosen, grid)
        for node in sorted(chosen - present):
            self._note(server_round, self._partition_of[node], "its node is not connected")
        if not present:
            raise RoundError(
                f"round {server_round}: none of the nodes of its {len(chosen)} clients was connected within "
                f"{self.wait_seconds:.0f} s (federation.wait_seconds)"
            )
        # Flower's sampling waits for ever for nodes to come: it is shown those that are there, and takes them all
        shown = cast(Grid, SimpleNamespace(get_node_ids=lambda: sorted(present)))
        messages = super().configure_train(server_round, arrays, config, shown)
        self._messages = sorted(messages, key=lambda message: self._partition_of[message.metadata.dst_node_id])
        return self._messages

    def _connected(self, nodes: set[int], grid: Grid) -> set[int]:
        """Those of the nodes that are connected. Waits while none is, and ``RETURN_SECONDS`` for one that did not fail
        last time: it may be back already, and Flower not know it yet."""
        started = time.monotonic()
        while missing := nodes - set(grid.get_node_ids()):
            patience = 0.0
            if missing == nodes:
                patience = self.wait_seconds
            elif any(self._partition_of[node] not in self.failures for node in missing):
                patience = min(RETURN_SECONDS, self.wait_seconds)
            if time.monotonic() - started >= patience:
                break
            time.sleep(0.5)
        return nodes - missing

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self.refused = set()
        return super().aggregate_train(server_round, self._in_order(server_round, replies))

    def refuse(self, server_round: int, node: int, reason: str) -> None:
        """To be called by whoever finds that a reply that was handed on cannot be used."""
        self.refused.add(self._partition_of[node])
        self._note(server_round, self._partition_of[node], reason)

    def _in_order(self, server_round: int, replies: Iterable[Message]) -> Iterator[Message]:
        """Usable replies by ascending partition; only those that come early are kept."""
        asked = {m.metadata.message_id: self._partition_of[m.metadata.dst_node_id] for m in self._messages}
        waiting = sorted(asked.values())
        early: dict[int, Message | None] = {}
        for reply in replies:
            partition = asked.get(reply.metadata.reply_to_message_id)
            if partition is None or partition not in waiting or partition in early:
                log(WARNING, "a reply in round %s that nobody asked for is left out", server_round)
                continue
            if problem := self._problem(reply, partition):
                self._note(server_round, partition, problem)
            early[partition] = None if problem else reply
            while waiting and waiting[0] in early:
                yield from self._handed_on(early.pop(first := waiting.pop(0)), first)
        for partition in waiting:
            if partition in early:
                yield from self._handed_on(early.pop(partition), partition)
            else:
                self._note(server_round, partition, "no answer within federation.round_seconds")

    def _handed_on(self, reply: Message | None, partition: int) -> Iterator[Message]:
        """The reply, if there is a usable one; afterwards a failure less, unless it turned out to be of no use."""
        if reply is not None:
            yield reply
            if partition not in self.refused:
                self.failures.pop(partition, None)

    def _note(self, server_round: int, partition: int, problem: str) -> None:
        """Counts failures in a row, and lets a client rest that has too many."""
        log(WARNING, "partition %s is left out of round %s: %s", partition, server_round, problem)
        self.failures[partition] = self.failures.get(partition, 0) + 1
        if self.failures[partition] >= self.max_failures:
            self.resting[partition] = server_round + self.rest_rounds
            problem += f"; it failed {self.failures[partition]} times in a row and rests for {self.rest_rounds} rounds"
        if self.on_fault is not None:
            self.on_fault(Fault(server_round, partition, problem))

    def _problem(self, reply: Message, partition: int) -> str:
        """Why a reply cannot be used; empty if it can. Nothing that a client sends may end the run."""
        if reply.has_error():
            return reply.error.reason or f"Flower's error {reply.error.code}"
        arrays, metrics = reply.content.array_records.get(ARRAYS), reply.content.metric_records.get(METRICS)
        if not arrays or metrics is None or len(reply.content) != 2:
            return f"its reply holds no arrays, no metrics, or more: {sorted(reply.content)}"
        try:
            values = [metric(metrics, key) for key in REPLY_METRICS]
        except ValueError as error:
            return str(error)
        if len(metrics) != len(values) or not all(map(math.isfinite, values)):
            return f"its metrics are not the finite numbers {', '.join(REPLY_METRICS)}"
        if metric(metrics, PARTITION) != partition or not 1 <= metric(metrics, NUM_EXAMPLES) <= self.max_examples:
            return (
                f"it answers for partition {metric(metrics, PARTITION)} with {metric(metrics, NUM_EXAMPLES)} examples"
            )
        return ""

    def summary(self) -> None:
        log(INFO, "\t├──> %s of %s clients a round, seed %s", self.clients_per_round, len(self.roster), self.seed)
        super().summary()
