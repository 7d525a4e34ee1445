"""Who is there: which node holds which partition, asked before the first round and whenever a node is new.

Flower's node ids are random; a node with a key of its own keeps its id over restarts, one without (``--insecure``)
comes back under another. So a partition belongs to the node that answers for it, and every connected node that holds
none is asked: at the roll call until all are there, and again before every round.

A node's word is not taken against another's. Where partitions are bound to nodes (by their keys), only the node that a
partition is bound to may hold it. Where they are not, the node that holds a partition keeps it while it is connected;
of several that claim a free one none gets it, since nobody knows which of them is right.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore import log

from strategies.errors import FederationError
from strategies.messages import Mailbox
from strategies.outcomes import Observer
from strategies.peer_text import clean
from strategies.wire import CONFIG, METRICS, PARTITION, PUBLISHED, REFUSAL, config_of, metric

AGAIN_SECONDS = 5.0
"""A node whose answer was of no use is asked again after so long: it may have been starting, or stopping."""
POLL_SECONDS = 1.0
SHOWN = 8  # reasons in one error


@dataclass(frozen=True)
class Problem:
    """Why a connected node holds no partition."""

    reason: str
    refused: bool = True  # False: an accident, it is asked again
    untrue: bool = False  # it claims what is not its own, or answers what no honest node does


class Roll:
    """The nodes of a federation, as far as they have answered. ``update`` keeps it true."""

    def __init__(
        self,
        grid: Grid,
        num_partitions: int,
        config: ConfigRecord,
        observer: Observer,
        wait_seconds: float = 180.0,
        bound: Mapping[int, int] | None = None,
    ) -> None:
        """
        Args:
            num_partitions: those from 0 on take part; nodes may hold others, which belong to larger federations.
            config: sent to every node; holds the run's settings, which it checks that it can serve.
            observer: is told of nodes that may not take part.
            wait_seconds: for a node's answer: it may have to load a model first.
            bound: node id -> the partition that its key was made for. Not empty: a node that is not in it holds none.
        """
        self.grid = grid
        self.num_partitions = num_partitions
        self.wait_seconds = wait_seconds
        self.bound = dict(bound or {})
        self.connected: set[int] = set()  # at the last update
        self.places: dict[int, int] = {}  # partition -> the connected node that holds it
        self.problems: dict[int, Problem] = {}  # node -> why it holds none
        self.published: dict[int, bytes] = {}  # node -> the public key that it gave for masked sums
        self._observer = observer
        self._config = config
        self._mailbox = Mailbox(grid)
        self._claims: dict[int, int] = {}  # node -> the partition that it says it holds
        self._holders: dict[int, int] = {}  # partition -> the node that holds it, or did last
        self._asked: dict[int, float] = {}  # node -> when; not answered yet
        self._not_before: dict[int, float] = {}  # node -> when it may be asked again
        self._said: dict[int, str] = {}  # node -> the last refusal that the observer was told of

    def update(self) -> dict[int, int]:
        """Takes the answers that have come and asks who has no place; gives ``places``."""
        self.connected = set(self.grid.get_node_ids())
        self._take_answers()
        self._ask()
        self._take_answers()  # an engine in this process answers at once
        self._deal()
        return self.places

    def waits_for_an_answer(self, seconds: float) -> bool:
        """Whether a connected node was asked in the last so many seconds and has not answered."""
        now = time.monotonic()
        return any(now - asked < seconds for node, asked in self._asked.items() if node in self.connected)

    def refused(self) -> dict[int, Problem]:
        """The connected nodes that may not take part."""
        return {node: p for node, p in sorted(self.problems.items()) if p.refused and node in self.connected}

    def forget(self, node: int) -> None:
        """The node is not what it said: it is asked again."""
        self._claims.pop(node, None)

    def _ask(self) -> None:
        now = time.monotonic()
        self._asked = {node: asked for node, asked in self._asked.items() if now - asked < self.wait_seconds}
        free = self.connected - self._claims.keys() - self._asked.keys()
        nodes = [node for node in sorted(free) if self._not_before.get(node, 0.0) <= now]
        if nodes:
            self._asked |= dict.fromkeys(nodes, now)
            self._mailbox.send(Message(RecordDict({CONFIG: self._config}), n, MessageType.QUERY) for n in nodes)

    def _take_answers(self) -> None:
        asked = {identity: m.metadata.dst_node_id for identity, m in self._mailbox.unanswered.items()}
        for reply in self._mailbox.arrived():
            node = asked[reply.metadata.reply_to_message_id]
            self._asked.pop(node, None)
            self._not_before[node] = time.monotonic() + AGAIN_SECONDS
            answer = _answer(reply)
            if isinstance(answer, int):
                answer = self._as_bound(node, answer)
            if isinstance(answer, int):
                self._claims[node] = answer
                self.published[node] = _published_in(reply)
                self.problems.pop(node, None)
            else:
                self._note(node, answer)

    def _as_bound(self, node: int, partition: int) -> int | Problem:
        own = self.bound.get(node)
        if not self.bound or own == partition:
            return partition
        holds = "its key is bound to none" if own is None else f"its key is bound to partition {own}"
        return Problem(f"claims partition {partition}, but {holds}", untrue=True)

    def _deal(self) -> None:
        """Gives every partition to the one node that holds it already or alone claims it."""
        claimants: dict[int, list[int]] = {}
        for node in sorted(self._claims.keys() & self.connected):
            if 0 <= self._claims[node] < self.num_partitions:
                claimants.setdefault(self._claims[node], []).append(node)
        self.places = {}
        for partition, nodes in claimants.items():
            holder = nodes[0] if len(nodes) == 1 else self._holders.get(partition)
            if holder in nodes:
                self.places[partition] = self._holders[partition] = holder
                self.problems.pop(holder, None)
                reason = f"claims partition {partition}, which node {holder} holds"
            else:
                reason = f"claims partition {partition}, as does another ({_named(nodes)}): two nodes hold partition "
                reason += f"{partition}, give each its own partition-id"
            for node in nodes:
                if node != holder:
                    self._note(node, Problem(reason, untrue=True))

    def _note(self, node: int, problem: Problem) -> None:
        """Says so once."""
        self.problems[node] = problem
        if self._said.get(node) == problem.reason:
            return
        self._said[node] = problem.reason
        log(WARNING, "node %s takes no part: it %s", node, problem.reason)
        if problem.refused:
            self._observer.node_refused(node, problem.reason)


def call_roll(
    roll: Roll, on_wait: Callable[[int], None] | None = None, min_partitions: int | None = None
) -> dict[int, int]:
    """Waits for the nodes and for their answers, and asks again whoever failed or came late, until all partitions are
    held, or no more can be, or ``roll.wait_seconds`` for the nodes to come and again for each to answer are over.

    A node that claims another's partition does not keep the others from starting: the run begins without the
    partitions that this may cost. So it does without others, where ``min_partitions`` allows.

    Args:
        on_wait: called with the number of connected nodes now and then while partitions are missing.
        min_partitions: how many must be held; None: all.

    Returns:
        Partition -> node.

    Raises:
        FederationError: too few partitions are held; the message says why, and names the nodes.
    """
    deadline = time.monotonic() + roll.wait_seconds
    while missing := roll.num_partitions - len(roll.update()):
        if not roll.waits_for_an_answer(roll.wait_seconds):
            accidents = any(not roll.problems[node].refused for node in roll.problems.keys() & roll.connected)
            if time.monotonic() > deadline or (missing <= len(roll.refused()) and not accidents):
                break
        if on_wait is not None:
            on_wait(len(roll.connected))
        time.sleep(POLL_SECONDS)
    needed = roll.num_partitions if min_partitions is None else min_partitions
    num_untrue = sum(problem.untrue for problem in roll.refused().values())
    if not roll.places or (len(roll.places) < needed and missing > num_untrue):
        raise FederationError(_what_is_missing(roll))
    for partition in sorted(set(range(roll.num_partitions)) - roll.places.keys()):
        log(WARNING, "no node holds partition %s: the run begins without it", partition)
    return roll.places


def _what_is_missing(roll: Roll) -> str:
    if len(roll.connected) < roll.num_partitions and not roll.problems:
        return (
            f"{len(roll.connected)} of {roll.num_partitions} nodes came within {roll.wait_seconds:.0f} s "
            "(federation.wait_seconds): start more nodes, or set federation.num_clients to what there is"
        )
    missing = sorted(set(range(roll.num_partitions)) - roll.places.keys())
    reasons = [f"node {node} {problem.reason}" for node, problem in sorted(roll.problems.items())]
    if roll.waits_for_an_answer(math.inf) or not reasons:
        reasons.append(
            f"the others did not come or did not answer within {roll.wait_seconds:.0f} s: if they are still loading "
            "the model, give them more with federation.wait_seconds"
        )
    shown = reasons[:SHOWN] + ([f"{len(reasons) - SHOWN} more"] if len(reasons) > SHOWN else [])
    what = f"no node serves partition {missing[0]} ({len(missing)} of {roll.num_partitions} missing)"
    return "; ".join([what, *shown])


def _named(nodes: list[int]) -> str:
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes[:4]))}{more}"


def _answer(reply: Message) -> int | Problem:
    """The partition that a node holds, or why it cannot serve."""
    if reply.has_error():
        return Problem(clean(f"failed: {reply.error.reason}"), refused=False)
    try:
        refusal = config_of(reply.content).get(REFUSAL, "")
        partition = int(metric(reply.content.metric_records.get(METRICS, MetricRecord()), PARTITION))
    except (ValueError, OverflowError) as error:
        return Problem(clean(f"gives no answer that can be read: {error}"), untrue=True)
    return Problem(clean(f"cannot take part: {refusal!s}")) if refusal else partition


def _published_in(reply: Message) -> bytes:
    """The key for masked sums in an answer; empty: there is none."""
    published = config_of(reply.content).get(PUBLISHED, b"")
    return published if isinstance(published, bytes) else b""
