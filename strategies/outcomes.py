"""What becomes of a client in a round: its reply is used (``Uplink``), or there is none of use (``Fault``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ABSENT = "absent"  # its node was not connected, or went away in the round
FAILED = "failed"  # it said that it could not, or nothing within the round's time
REFUSED = "refused"  # the server did not take what it sent
KINDS = (ABSENT, FAILED, REFUSED)


@dataclass(frozen=True)
class Uplink:
    """What one client sent in one round; counted from the arrays as they arrived, before they are decoded."""

    server_round: int
    partition: int
    payload_bytes: int
    payload_digest: str
    train_loss: float | None  # None: withheld, as it is not private
    seconds_train: float
    seconds_encode: float
    update_norm: float = 0.0  # L2, of the whole decoded update
    scale: float = 1.0  # below 1: the update was scaled down to the bound (``norms.py``)
    seconds_decode: float = 0.0  # on the server
    num_examples: int | None = None  # that it trained on, by its own word; None: withheld
    rank: int | None = None  # of every factor it trained the first so many rows; None: all


DOWNLINK_BYTES = ("step_bytes", "catch_up_bytes", "snapshot_bytes", "side_bytes")
"""The parts of a ``Downlink``, by name, as they stand in results and event logs."""


@dataclass(frozen=True)
class Downlink:
    """What went to one client in one round, in bytes of arrays, by what it is for."""

    server_round: int
    partition: int
    step_bytes: int = 0  # the adapter, or the last step of it
    catch_up_bytes: int = 0  # steps before the last one, which it missed
    snapshot_bytes: int = 0  # of all that is held, for who holds nothing, or of a key
    side_bytes: int = 0  # the codec's side information
    evaluating: bool = False  # to be evaluated: what came out of ``server_round``, not what it starts from

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, part) for part in DOWNLINK_BYTES)


@dataclass(frozen=True)
class Fault:
    """A client that gave nothing usable in a round, and why. Only ``failed`` and ``refused`` count towards a rest."""

    server_round: int
    partition: int
    reason: str
    kind: str = REFUSED
    node: int = 0  # Flower's id; 0: none is known for the partition
    evaluating: bool = False  # it was asked for its held-out loss after the round, not for an update: no strike
    rests_until: int = 0  # the last round that it is left out of for this; 0: it does not rest


@dataclass(frozen=True)
class NodeLoss:
    """What one client's node says of the adapter that came out of a round, 0: of the first one."""

    server_round: int
    partition: int
    loss: float  # mean over its held-out tokens, nats
    tokens: int
    windows: int
    seconds: float  # on the node
    answer_bytes: int = 0  # of the reply's records, as Flower serialises them


class Observer(Protocol):
    """Who is told of outcomes as they come. A round that is tried again tells of its clients again."""

    def uplink(self, uplink: Uplink) -> None: ...

    def downlink(self, downlink: Downlink) -> None: ...

    def fault(self, fault: Fault) -> None: ...

    def node_refused(self, node: int, reason: str) -> None:
        """A node that may not take part, or not as what it says to be."""


class EvaluationObserver(Protocol):
    """Who is told of an evaluation on the nodes as its answers come."""

    def downlink(self, downlink: Downlink) -> None: ...

    def fault(self, fault: Fault) -> None: ...
