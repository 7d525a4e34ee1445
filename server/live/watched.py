"""What is seen of a run while it goes on: its status, its clients and its faults, folded from the event log.

``RunWatch`` reads the folder, ``Snapshot`` is one look at it: plain values of bounded number and length, whatever
stands in the log, which a terminal (``server.live.view``) and a page (``server.live.page``) show alike. No engine is
loaded.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.console import printable
from server.live.status import ENDED, Watcher
from server.records.events import WHO, WORDS, Event, RunStatus, count_of, number_of
from server.records.places import continuation
from strategies.outcomes import DOWNLINK_BYTES, FAILED, KINDS

MOST_CLIENTS = 10_000
"""That are kept apart; of more there are the sums alone."""
SHOWN_CLIENTS = 500
SHOWN_LOSSES = 400
SHOWN_FAULTS = 20
ASKED, ANSWERED, RESTING, SILENT = "asked", "answered", "resting", "no answer"
LONGEST_REASON = 300
"""Characters."""
Loss = tuple[int, float | None]
"""Round, and nats per token; None: not finite."""
OWN_WORDS = "withheld: a client's own words may quote its data"


@dataclass
class ClientRecord:
    """What a partition's node did in the rounds that it was asked in."""

    outcome: str = ASKED  # of the last time: asked | answered | one of ``KINDS``
    last_round: int = 0
    last_answer: float | None = None  # Unix seconds, of the last reply that was used
    asked: int = 0  # times; a round that is tried again counts again
    answered: int = 0
    faults: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rests_until: int = 0


@dataclass(frozen=True)
class FaultSeen:
    """A client that gave nothing to a round, or a round that could not be kept."""

    time: float
    server_round: int
    partition: int | None  # None: of no client
    kind: str
    reason: str


class Clients:
    """The clients and faults of a run, folded from its events."""

    def __init__(self) -> None:
        self.records: dict[int, ClientRecord] = {}
        self.left_out = 0  # events of partitions beyond ``MOST_CLIENTS``
        self.faults: deque[FaultSeen] = deque(maxlen=SHOWN_FAULTS)
        self.kinds: Counter[str] = Counter()
        self.refused: dict[str, str] = {}  # node -> why it may not take part, the last ones
        self.are_secret = False  # who takes part is drawn in secret, and told to nobody
        self._are_silent = False  # what clients say of their faults may quote their data
        self._again: set[int] = set()  # that were sent something since the round began

    def add(self, event: Event) -> None:
        """What is unknown or not of the expected types is left aside."""
        try:
            change = _CHANGES.get(event["event"])
            if change is not None:
                change(self, event)
        except (KeyError, TypeError, ValueError):
            return

    def _start(self, event: Event) -> None:
        withheld = event.get("withheld")
        withheld = withheld if isinstance(withheld, list) else []
        self.are_secret, self._are_silent = WHO in withheld, WORDS in withheld

    def _record(self, event: Event) -> ClientRecord | None:
        partition = count_of(event, "partition")
        if partition not in self.records and len(self.records) >= MOST_CLIENTS:
            self.left_out += 1
            return None
        return self.records.setdefault(partition, ClientRecord())

    def _take_downlink(self, event: Event) -> None:
        server_round, size = count_of(event, "server_round"), sum(count_of(event, part) for part in DOWNLINK_BYTES)
        record = self._record(event)
        if record is None:
            return
        record.bytes_down += size
        if event.get("evaluating") is True:  # it is asked for a loss, after the round
            return
        self._again.add(event["partition"])
        if record.last_round != server_round or not record.asked:
            self._ask(record, server_round)
            self._again.discard(event["partition"])

    def _ask(self, record: ClientRecord, server_round: int) -> None:
        record.outcome, record.last_round, record.asked = ASKED, server_round, record.asked + 1

    def _start_round(self, event: Event) -> None:
        """Who was sent something in this round before has answered it, and is asked again: it is tried again."""
        server_round = count_of(event, "server_round")
        for partition in self._again:
            record = self.records[partition]
            if record.last_round == server_round:
                self._ask(record, server_round)
        self._again.clear()

    def _take_uplink(self, event: Event) -> None:
        server_round, size = count_of(event, "server_round"), count_of(event, "payload_bytes")
        record = self._record(event)
        if record is not None:
            record.outcome, record.last_round, record.last_answer = ANSWERED, server_round, number_of(event, "time")
            record.answered, record.bytes_up, record.rests_until = record.answered + 1, record.bytes_up + size, 0
            record.asked = max(record.asked, record.answered + record.faults)

    def _take_fault(self, event: Event) -> None:
        server_round, partition = count_of(event, "server_round"), count_of(event, "partition")
        kind = event.get("kind")
        kind = kind if kind in KINDS else FAILED
        rests_until = count_of(event, "rests_until") if "rests_until" in event else 0
        reason = printable(event["reason"], LONGEST_REASON)
        if self._are_silent and kind == FAILED:
            reason = OWN_WORDS
        self.faults.append(FaultSeen(number_of(event, "time"), server_round, partition, kind, reason))
        self.kinds[kind] += 1
        record = self._record(event) if event.get("evaluating") is not True else None
        if record is not None:
            record.outcome, record.last_round, record.faults = kind, server_round, record.faults + 1
            record.rests_until = rests_until
            record.asked = max(record.asked, record.answered + record.faults)

    def _refuse_node(self, event: Event) -> None:
        node = printable(event["node"], 24)
        self.refused.pop(node, None)
        self.refused[node] = printable(event["reason"], LONGEST_REASON)
        while len(self.refused) > SHOWN_FAULTS:
            self.refused.pop(next(iter(self.refused)))

    def _miss_checkpoint(self, event: Event) -> None:
        reason = printable(event["reason"], LONGEST_REASON)
        server_round = count_of(event, "server_round")
        self.faults.append(FaultSeen(number_of(event, "time"), server_round, None, "no checkpoint", reason))


_CHANGES: dict[str, Callable[[Clients, Event], None]] = {
    "run_started": Clients._start,
    "run_resumed": Clients._start,
    "downlink": Clients._take_downlink,
    "round_started": Clients._start_round,
    "uplink": Clients._take_uplink,
    "fault": Clients._take_fault,
    "node_refused": Clients._refuse_node,
    "checkpoint_failed": Clients._miss_checkpoint,
}


@dataclass(frozen=True)
class ClientSeen:
    """One client, as it is shown."""

    partition: int
    state: str  # asked | answered | absent | failed | refused | resting | no answer
    last_round: int  # that it was asked in
    asked: int
    answered: int
    faults: int
    last_answer: float | None
    bytes_up: int
    bytes_down: int
    rests_until: int  # a round, while it rests; else 0

    @property
    def is_well(self) -> bool:
        return self.state in (ASKED, ANSWERED)


@dataclass(frozen=True)
class Snapshot:
    """One look at a run. Times are Unix seconds, by the clock of the run's host but for ``now``."""

    folder: str
    now: float
    state: str  # starting | waiting | running | finished | failed | stopped | dead
    label: str = ""
    run_id: str = ""
    reason: str = ""  # why it failed, or ended early
    what_now: str = ""  # what goes on with it
    rounds: int = 0
    rounds_done: int = 0
    nodes: int = 0
    asked: int = 0  # in the round that is under way, or was last
    answers: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    updated: float = 0.0
    losses: Sequence[Loss] = ()  # held out on the server
    node_losses: Sequence[Loss] = ()  # over all tokens that nodes hold out
    worst_client: str = ""  # of the last of those, and what it loses
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_missed: int = 0  # of those down: what clients had missed
    uplinks: int = 0
    are_secret: bool = False
    clients: Sequence[ClientSeen] = ()
    clients_left_out: int = 0
    num_faults: int = 0
    kinds: dict[str, int] = field(default_factory=dict)  # of fault -> times
    faults: Sequence[FaultSeen] = ()  # the last ones, the latest first
    refused: dict[str, str] = field(default_factory=dict)  # nodes that may not take part -> why

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """Plain values, with no number that JSON does not have."""
        return asdict(self)


class RunWatch:
    """Looks at a run's folder again and again."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError: the folder holds no run."""
        self.folder = folder
        self._clients = Clients()
        self._watcher = Watcher(folder, self._take)

    def _take(self, event: Event) -> None:
        if event.get("event") == "run_started":  # in a folder where another was before
            self._clients = Clients()
        self._clients.add(event)

    def look(self) -> Snapshot:
        """The run as it stands now. Raises ValueError: the folder holds no run any more."""
        return snapshot_of(self.folder, self._watcher.status(), self._clients, time.time())


def snapshot_of(folder: Path, status: RunStatus, clients: Clients, now: float) -> Snapshot:
    """What is shown of these, at this time."""
    goes_on = status.state in ("waiting", "running")
    left = status.seconds_left
    shown, left_out = _shown_clients(status, clients)
    return Snapshot(
        folder=printable(folder),
        now=round(now, 3),
        state="starting" if status.state == "unknown" else status.state,
        label=status.label,
        run_id=status.run_id,
        reason=status.reason,
        what_now=printable(continuation(folder)) if status.state in ("dead", "stopped", "failed") else "",
        rounds=status.rounds,
        rounds_done=status.server_round,
        nodes=status.nodes,
        asked=status.asked,
        answers=status.answers,
        seconds=max(0.0, (now if goes_on else status.updated) - status.started) if status.started else 0.0,
        seconds_left=left if status.state == "running" and left is not None and math.isfinite(left) else None,
        updated=status.updated,
        losses=_thinned([*enumerate(status.heldout_loss)]),
        node_losses=_thinned([*status.node_losses.items()]),
        worst_client="" if clients.are_secret else status.worst_client,
        bytes_up=status.payload_bytes,
        bytes_down=status.bytes_down,
        bytes_missed=status.bytes_missed,
        uplinks=status.uplinks,
        are_secret=clients.are_secret,
        clients=shown,
        clients_left_out=left_out,
        num_faults=status.faults,
        kinds=dict(clients.kinds),
        faults=() if clients.are_secret else tuple(reversed(clients.faults)),
        refused=dict(clients.refused),
    )


def _thinned(losses: Sequence[tuple[int, float]]) -> list[Loss]:
    """At most ``SHOWN_LOSSES`` of them, the first and the last among them."""
    last, most = len(losses) - 1, SHOWN_LOSSES - 1
    kept = range(len(losses)) if last <= most else sorted({round(step * last / most) for step in range(most + 1)})
    return [(number, loss if math.isfinite(loss) else None) for number, loss in map(losses.__getitem__, kept)]


def _shown_clients(status: RunStatus, clients: Clients) -> tuple[list[ClientSeen], int]:
    """By partition; of very many those that are not well come first. And how many are left out."""
    if clients.are_secret:
        return [], 0
    seen = [_seen(partition, record, status) for partition, record in sorted(clients.records.items())]
    kept = sorted(seen, key=lambda one: (one.is_well, one.partition))[:SHOWN_CLIENTS]
    return sorted(kept, key=lambda one: one.partition), len(seen) - len(kept)


def _seen(partition: int, record: ClientRecord, status: RunStatus) -> ClientSeen:
    state, coming = record.outcome, status.server_round + 1
    if state == ASKED and (status.state in ENDED or record.last_round < coming):
        state = SILENT
    rests = state not in (ASKED, ANSWERED) and record.rests_until >= coming and status.state not in ENDED
    return ClientSeen(
        partition=partition,
        state=RESTING if rests else state,
        last_round=record.last_round,
        asked=record.asked,
        answered=record.answered,
        faults=record.faults,
        last_answer=record.last_answer,
        bytes_up=record.bytes_up,
        bytes_down=record.bytes_down,
        rests_until=record.rests_until if rests else 0,
    )
