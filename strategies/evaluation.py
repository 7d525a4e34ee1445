"""What nodes say of the global adapter: messages of Flower's kind ``evaluate`` out, a few numbers each back.

The adapter goes the way that it goes to training (``broadcast.py``): who holds an earlier state is sent what leads on
from it, and is known to hold the new one when it has answered, so that the next round brings it nothing twice.

Answers are anybody's: numbers of other kinds, ranges or counts than asked for are a fault, a second answer is left out,
and none of it ends a run. Who fails here is not counted among those that fail in training.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore import log
from torch import Tensor

from strategies.broadcast import Broadcaster
from strategies.messages import in_order, replies_to
from strategies.outbox import Outbox
from strategies.outcomes import FAILED, REFUSED, Downlink, EvaluationObserver, Fault, NodeLoss
from strategies.peer_text import clean
from strategies.receive import Refused, failure_of, lacks_of
from strategies.roll import Roll
from strategies.wire import (
    ARRAYS,
    CONFIG,
    EVALUATION_METRICS,
    HELDOUT_LOSS,
    HELDOUT_TOKENS,
    HELDOUT_WINDOWS,
    METRICS,
    MOST_LOSS,
    PARTITION,
    SECONDS_EVALUATE,
    SERVER_ROUND,
    SETTINGS,
    metric,
)


@dataclass(frozen=True)
class Bounds:
    """What an honest answer keeps to."""

    max_windows: int  # that a client holds out
    window: int  # tokens in each


def panel(num_clients: int, size: int | None, seed: int) -> frozenset[int]:
    """Who is asked, throughout a run: so a change of their loss is one of the adapter, not of who was asked.

    Args:
        num_clients: partitions from 0 on.
        size: how many of them; None: all.
        seed: of the run.
    """
    everybody = range(num_clients)
    if size is None or size >= num_clients:
        return frozenset(everybody)
    return frozenset(random.Random(f"evaluate/{seed}").sample(everybody, size))


class Evaluation:
    """Asks a panel of clients, each time those of them whose nodes are connected; nobody is waited for."""

    def __init__(
        self, grid: Grid, roll: Roll, broadcaster: Broadcaster, clients: frozenset[int], bounds: Bounds
    ) -> None:
        self.grid = grid
        self.roll = roll
        self.broadcaster = broadcaster
        self.clients = clients
        self.bounds = bounds

    def ask(
        self,
        server_round: int,
        adapter: Mapping[str, Tensor],
        settings: str,
        seconds: float,
        observer: EvaluationObserver,
    ) -> Poll:
        """Sends the messages; ``Poll.losses`` then takes the answers.

        Args:
            server_round: that the adapter came out of.
            adapter: the global one, which the broadcaster was told of (``settle``).
            settings: the run's, as JSON.
            seconds: for all answers to come.
            observer: is told of what is sent, and of who gives nothing.
        """
        places = self.roll.update()
        nodes = {partition: places[partition] for partition in sorted(self.clients & places.keys())}
        poll = Poll(server_round, nodes, self.broadcaster, self.bounds, observer)
        poll.send(self.grid, adapter, settings, seconds)
        return poll


class Poll:
    """One evaluation."""

    def __init__(
        self,
        server_round: int,
        nodes: Mapping[int, int],
        broadcaster: Broadcaster,
        bounds: Bounds,
        observer: EvaluationObserver,
    ) -> None:
        """``nodes``: partition -> node, of all that are asked."""
        self.server_round = server_round
        self.nodes = nodes
        self.broadcaster = broadcaster
        self.bounds = bounds
        self.observer = observer
        self._outbox = Outbox([], nodes, broadcaster)
        self._replies: Iterator[Message] = iter(())

    def send(self, grid: Grid, adapter: Mapping[str, Tensor], settings: str, seconds: float) -> None:
        for partition, node in self.nodes.items():
            arrays, of_adapter, sent = self.broadcaster.outgoing(partition, adapter)
            config = ConfigRecord({SETTINGS: settings, SERVER_ROUND: self.server_round, **of_adapter})
            message = Message(RecordDict({ARRAYS: arrays, CONFIG: config}), node, MessageType.EVALUATE)
            self._outbox.messages.append(message)
            self._tell(sent)
        if self.nodes:
            self._replies = replies_to(grid, [*self._outbox.messages], seconds, self._again)

    def losses(self) -> list[NodeLoss]:
        """Of those that gave one, by ascending partition, once all have answered or their time is over."""
        found = []
        for partition, reply in in_order(sorted(self.nodes), self._outbox.partition_of, self._replies):
            answer = judged(reply, self.server_round, partition, self.bounds)
            if isinstance(answer, NodeLoss):
                self.broadcaster.answered(partition)
                found.append(answer)
            else:
                self._fault(partition, answer)
        return found

    def _again(self, reply: Message) -> Message | None:
        """What a client is sent that could not take in what it was sent, once. None: the reply is an answer."""
        repair = self._outbox.repair(reply)
        if repair is None:
            return None
        message, sent = repair
        self._tell(sent)
        return message

    def _tell(self, sent: Downlink) -> None:
        self.observer.downlink(dataclasses.replace(sent, server_round=self.server_round, evaluating=True))

    def _fault(self, partition: int, refused: Refused) -> None:
        node = self.nodes[partition]
        log(
            WARNING,
            "partition %s (node %s) gives no loss of the adapter of round %s: %s",
            partition,
            node,
            self.server_round,
            refused.reason,
        )
        self.observer.fault(Fault(self.server_round, partition, refused.reason, refused.kind, node, evaluating=True))


def judged(reply: Message | None, server_round: int, partition: int, bounds: Bounds) -> NodeLoss | Refused:
    """What a reply says, if it is what was asked for; None: there was none in time."""
    if reply is None:
        return Refused(FAILED, "no loss within federation.round_seconds")
    if reply.has_error():
        return failure_of(reply.error)
    if lacks_of(reply) is not None:
        return Refused(REFUSED, "it does not come to hold the adapter that is to be evaluated")
    try:
        said = _numbers_of(reply.content)
        if (said[PARTITION], said[SERVER_ROUND]) != (partition, server_round):
            raise ValueError(f"it answers for partition {said[PARTITION]:g} and round {said[SERVER_ROUND]:g}")
        _check_ranges(said, bounds)
    except ValueError as error:
        return Refused(REFUSED, clean(error))
    size = len(recorddict_to_proto(reply.content).SerializeToString())
    tokens, windows = int(said[HELDOUT_TOKENS]), int(said[HELDOUT_WINDOWS])
    return NodeLoss(server_round, partition, said[HELDOUT_LOSS], tokens, windows, said[SECONDS_EVALUATE], size)


def _numbers_of(content: RecordDict) -> dict[str, float]:
    """Raises ValueError: the reply is not the one record of finite numbers that is wanted."""
    metrics = content.metric_records.get(METRICS, MetricRecord())
    if len(content) != 1 or len(metrics) != len(EVALUATION_METRICS):
        raise ValueError(f"its answer is not one record of {', '.join(EVALUATION_METRICS)}")
    try:
        said = {key: float(metric(metrics, key)) for key in EVALUATION_METRICS}
    except OverflowError:
        raise ValueError("a number of its answer is larger than a float") from None
    if not all(map(math.isfinite, said.values())):
        raise ValueError("a number of its answer is not finite")
    return said


def _check_ranges(said: Mapping[str, float], bounds: Bounds) -> None:
    """Raises ValueError: no held-out windows of the run's settings give such an answer."""
    windows, tokens = said[HELDOUT_WINDOWS], said[HELDOUT_TOKENS]
    ranges = {
        HELDOUT_LOSS: (0.0, MOST_LOSS),
        HELDOUT_WINDOWS: (1, bounds.max_windows),
        HELDOUT_TOKENS: (windows, windows * (bounds.window - 1)),  # a window in which none counts is left out
        SECONDS_EVALUATE: (0.0, math.inf),
    }
    for key, (least, most) in ranges.items():
        if not least <= said[key] <= most:
            raise ValueError(f"it says {key} {said[key]:g}: between {least:g} and {most:g} are expected")
    if windows != int(windows) or tokens != int(tokens):
        raise ValueError("its windows and tokens are no whole numbers")
