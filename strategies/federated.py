"""One round of a federation, around any Flower strategy: whom to ask, what goes out, what of the replies counts.

Who takes part is ``sampling.py`` and ``roll.py``, what a reply holds ``receive.py``, how much it may add ``norms.py``;
here they meet. The strategy inside sees dense adapters only, by ascending partition, and takes all that it is shown.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from logging import INFO, WARNING
from types import SimpleNamespace
from typing import cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor

from gradcodec.state import State
from strategies.broadcast import Broadcaster
from strategies.errors import RoundError
from strategies.messages import in_order
from strategies.norms import NormBound
from strategies.optimizer import begin_round, optimizer_state, restore_optimizer
from strategies.outbox import Outbox
from strategies.outcomes import ABSENT, REFUSED, Fault, Observer, Uplink
from strategies.receive import Asked, Decoded, Receiver, Refused, decoded, receive
from strategies.roll import POLL_SECONDS, Roll
from strategies.sampling import Sampling
from strategies.tensors import from_record, moved_to_record
from strategies.wire import ARRAYS, CONFIG, METRICS, RANK, SIDE
from strategies.wrapping import AdapterStrategy

RETURN_SECONDS = 20.0
"""Flower counts a node as gone 60 s after its last heartbeat, and one whose network was cut for 20 s may send none for
longer: they come every 22.5 s at most, and after a failure only when waits of 1, 2, 4, 8 and 16 s are over
(``python -m bench.heartbeats``)."""

FIRST = 8
"""The norms of so many replies are known before the first of them is used. They are kept as they came, so that the
server's memory does not grow with the number of clients."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a round bears."""

    min_replies: int = 1  # a round with fewer usable replies comes to nothing
    max_examples: float = float("inf")  # a client's weight is its own word: this bounds it
    wait_seconds: float = 180.0  # for one of a round's nodes to be connected
    says_loss: bool = True  # clients say their training loss


@dataclasses.dataclass(frozen=True)
class Ways:
    """Of the adapter to the clients, and of what they trained back."""

    down: Broadcaster
    up: Receiver


class FederatedStrategy(AdapterStrategy):
    """Asks the sampled partitions whose nodes are connected, and hands on what can be used of their replies.

    The seed decides who is asked, and replies go on by ascending partition: the same seed gives the same bits.
    """

    def __init__(
        self,
        inner: Strategy,
        ways: Ways,
        roll: Roll,
        sampling: Sampling,
        bound: NormBound,
        observer: Observer,
        limits: Limits,
    ) -> None:
        super().__init__(inner)
        self.broadcaster, self.receiver = ways.down, ways.up
        self.roll = roll
        self.sampling = sampling
        self.bound = bound
        self.observer = observer
        self.limits = limits
        self.uplinks: list[Uplink] = []  # what the last averaged round is made of
        self._absent: set[int] = set()  # partitions that were absent when they were last looked for
        self._outbox = Outbox([], {}, ways.down)  # of this round
        self._nodes: dict[int, int] = {}  # partition -> node, of this round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to those of the round's clients whose nodes are connected.

        Raises:
            RoundError: none of them was within ``limits.wait_seconds``.
            BudgetSpentError: the run's privacy budget allows no such round.
        """
        begin_round(self.inner)
        chosen = self.sampling.sample(server_round, self.least_clients)
        self._nodes = self._present(chosen)
        for partition in chosen:
            if partition not in self._nodes:
                self._fault(server_round, partition, Refused(ABSENT, "its node is not connected"))
        if not self._nodes:
            raise RoundError(
                f"round {server_round}: none of the nodes of its {len(chosen)} clients was connected within "
                f"{self.limits.wait_seconds:.0f} s (federation.wait_seconds)"
            )
        self.sampling.asked(server_round, self._nodes)
        self._begin(server_round, arrays, grid)
        # Flower's sampling waits for ever for nodes to come: it is shown those that are there, and takes them all
        partition_of = {node: partition for partition, node in self._nodes.items()}
        shown = cast(Grid, SimpleNamespace(get_node_ids=lambda: sorted(partition_of)))
        messages = list(super().configure_train(server_round, arrays, config, shown))
        messages.sort(key=lambda message: partition_of[message.metadata.dst_node_id])
        for message in messages:
            partition = partition_of[message.metadata.dst_node_id]
            adapter, of_adapter, sent = self.broadcaster.outgoing(partition, self.current)
            records, entries = self.receiver.outgoing(partition)
            own_config = ConfigRecord({**message.content.config_records[CONFIG], **of_adapter, **entries})
            message.content = RecordDict({**message.content, **records, ARRAYS: adapter, CONFIG: own_config})
            side_bytes = sum(len(array.data) for array in records.array_records.get(SIDE, {}).values())
            side_bytes += sum(len(value) for value in entries.values() if isinstance(value, bytes))
            self.observer.downlink(dataclasses.replace(sent, server_round=server_round, side_bytes=side_bytes))
        self._outbox = Outbox(messages, self._nodes, self.broadcaster)
        return messages

    @property
    def least_clients(self) -> int:
        """That a round takes."""
        return self.limits.min_replies

    def _begin(self, server_round: int, arrays: ArrayRecord, grid: Grid) -> None:
        """Before the messages are made: the adapter and the nodes are known. Raises RoundError: they will not do."""

    def again(self, server_round: int, reply: Message) -> Message | None:
        """What a client is sent that could not take in what it was sent: once a round. None: the reply is an answer."""
        repair = self._outbox.repair(reply)
        if repair is None:
            return None
        message, sent = repair
        partition = self._outbox.partition_of(reply)
        log(WARNING, "partition %s holds another adapter than the server: it is sent what it needs", partition)
        self.observer.downlink(dataclasses.replace(sent, server_round=server_round))
        return message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next adapter.

        Raises:
            RoundError: too few replies were of use. Nothing has changed: the clients keep what their payloads carried.
        """
        taken: list[Uplink] = []
        too_long: list[Uplink] = []
        usable = self._usable(server_round, replies, taken, too_long)
        arrays, metrics = super().aggregate_train(server_round, usable)
        adapter, step = self.broadcaster.settle(self.current, self._new(server_round, arrays, len(taken)))
        # A client is not asked for the same again that was too long: with the next update on top it would be longer.
        self.receiver.averaged([*taken, *too_long], step)
        self.bound.averaged([uplink.scale * uplink.update_norm for uplink in taken])
        for uplink in taken:
            self.sampling.answered(uplink.partition)
        self.uplinks = taken
        return moved_to_record(adapter), metrics

    def _new(self, server_round: int, arrays: ArrayRecord | None, num_replies: int) -> dict[str, Tensor]:
        """What the strategy inside came to, which may be anybody's. Raises RoundError: no adapter like this one."""
        if arrays is None:
            raise RoundError(
                f"round {server_round}: of {num_replies} replies the strategy makes nothing: too few for it?"
            )
        new = from_record(arrays)
        if {name: t.shape for name, t in new.items()} != {name: t.shape for name, t in self.current.items()}:
            raise RoundError(
                f"round {server_round}: the strategy makes other tensors of the replies than the adapter has"
            )
        return new

    def foresee(self, step: Mapping[str, Tensor]) -> None:
        """What the first global update may be like, before there is any."""
        self.receiver.foresee(dict(step))
        self.receiver.side = self.broadcaster.foresee(self.receiver.side)

    def state(self) -> State:
        """All that this strategy and those inside it remember from round to round."""
        receiver = self.receiver.state()
        broadcaster = self.broadcaster.state()
        tensors = {f"receiver/{key}": tensor for key, tensor in receiver.tensors.items()}
        tensors |= {f"broadcaster/{key}": tensor for key, tensor in broadcaster.tensors.items()}
        tensors |= {f"optimizer/{key}": tensor for key, tensor in optimizer_state(self.inner).items()}
        values = {
            "sampling": self.sampling.state(),
            "receiver": receiver.values,
            "broadcaster": broadcaster.values,
            "norms": self.bound.state(),
        }
        return State(values, tensors)

    def load_state(self, state: State) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""

        def under(head: str) -> dict[str, Tensor]:
            return {key.removeprefix(head): t for key, t in state.tensors.items() if key.startswith(head)}

        self.sampling.load_state(state.values["sampling"])
        self.receiver.load_state(State(state.values["receiver"], under("receiver/")))
        self.broadcaster.load_state(State(state.values["broadcaster"], under("broadcaster/")))
        self.bound.load_state(state.values["norms"])
        restore_optimizer(self.inner, under("optimizer/"))

    def _present(self, chosen: Sequence[int]) -> dict[int, int]:
        """Those of the partitions whose nodes are connected, and the nodes.

        Waits while none is; for ``RETURN_SECONDS``, where one is missing that was there last time (it may be back, and
        Flower not know it yet), or where a new node has yet to say what it holds.
        """
        started = time.monotonic()
        while True:
            places = self.roll.update()
            present = {partition: places[partition] for partition in chosen if partition in places}
            missing = set(chosen) - present.keys()
            if not missing:
                patience = 0.0
            elif not present:
                patience = self.limits.wait_seconds
            elif missing - self._absent or self.roll.waits_for_an_answer(RETURN_SECONDS):
                patience = min(RETURN_SECONDS, self.limits.wait_seconds)
            else:
                patience = 0.0
            if time.monotonic() - started >= patience:
                self._absent = (self._absent - present.keys()) | missing
                return present
            time.sleep(POLL_SECONDS)

    def _usable(
        self, server_round: int, replies: Iterable[Message], taken: list[Uplink], too_long: list[Uplink]
    ) -> Iterator[Message]:
        """The replies that count, each with its adapter in dense Arrays; ``taken`` notes them, ``too_long`` those that
        were refused for their length.

        Raises RoundError behind the last one if they were too few: before anything is averaged.
        """
        decoded = self._decoded(server_round, replies)
        known = [reply.without() for reply in islice(decoded, FIRST)]
        usual = self.bound.reference([reply.uplink.update_norm for reply in known])
        for reply in chain(known, decoded):
            partition, norm = reply.asked.partition, reply.uplink.update_norm
            scale = self.bound.scale(norm, usual)
            if scale is None:
                assert usual is not None and self.bound.max_ratio is not None
                reason = (
                    f"its update has norm {norm:.3g}, and {self.bound.max_ratio * usual:.3g} is the most: "
                    f"strategy.max_norm_ratio={self.bound.max_ratio:g} times the usual {usual:.3g}"
                )
                too_long.append(reply.uplink)
                self._fault(server_round, partition, Refused(REFUSED, reason))
                continue
            if scale < 1:
                said = "the update of partition %s (node %s) in round %s has norm %.3g and is scaled by %.3g"
                log(WARNING, said, partition, self._nodes.get(partition), server_round, norm, scale)
            uplink = dataclasses.replace(reply.uplink, scale=scale)
            taken.append(uplink)
            self.observer.uplink(uplink)
            yield self._message(reply, scale)
        if len(taken) < self.limits.min_replies:
            raise RoundError(
                f"round {server_round}: {len(taken)} usable replies, federation.min_replies="
                f"{self.limits.min_replies}; see above"
            )

    def _decoded(self, server_round: int, replies: Iterable[Message]) -> Iterator[Decoded]:
        """The replies that are whole and are what they say, by ascending partition; all others are noted."""
        seen: dict[str, int] = {}  # digest -> the partition that it first came from
        for partition, reply in in_order(sorted(self._nodes), self._outbox.partition_of, replies):
            asked = Asked(server_round, partition, self.limits.max_examples, self.limits.says_loss)
            found = receive(reply, asked, self.receiver, self.current)
            if isinstance(found, Decoded) and found.uplink.update_norm > 0:
                first = seen.setdefault(found.uplink.payload_digest, partition)
                if first != partition:
                    found = Refused(REFUSED, f"it sends what partition {first} sent in this round")
            if isinstance(found, Decoded):
                self.broadcaster.answered(partition)
                yield found
            else:
                self._fault(server_round, partition, found)

    def _message(self, reply: Decoded, scale: float) -> Message:
        """What the inner strategy gets: the client's adapter, as if it had been sent densely."""
        adapter = reply.adapter
        if adapter is None:
            adapter = decoded(reply.content, reply.asked, self.receiver, self.current, reply.uplink.rank)
        if scale < 1:
            for name, tensor in self.current.items():
                adapter[name].sub_(tensor).mul_(scale).add_(tensor)
        said = reply.content.metric_records[METRICS]
        metrics = MetricRecord({key: value for key, value in said.items() if key != RANK})
        content = RecordDict({ARRAYS: moved_to_record(adapter), METRICS: metrics})
        if reply.uplink.rank is not None:
            content[CONFIG] = ConfigRecord({RANK: reply.uplink.rank})
        return Message(content, self._nodes.get(reply.asked.partition, 1), "train")

    def _fault(self, server_round: int, partition: int, refused: Refused) -> None:
        """Notes a client that gives nothing to the round. Who is absent is not punished: no round waits for it."""
        node, reason, rests_until = self._nodes.get(partition, 0), refused.reason, 0
        if refused.claims_another:
            self.roll.forget(node)
        if refused.has_spent:
            self.sampling.has_spent(partition)
        elif refused.kind != ABSENT and (rests := self.sampling.failed(server_round, partition)):
            reason, rests_until = reason + rests, self.sampling.resting[partition]
        log(WARNING, "partition %s (node %s) is left out of round %s: %s", partition, node, server_round, reason)
        self.observer.fault(Fault(server_round, partition, reason, refused.kind, node, rests_until=rests_until))

    def summary(self) -> None:
        sampling = self.sampling
        log(
            INFO,
            "\t├──> %s of %s clients a round",
            sampling.clients_per_round,
            sampling.num_partitions,
        )
        super().summary()
