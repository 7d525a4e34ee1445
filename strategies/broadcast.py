"""How the global adapter gets to the clients: as it is, or as coded steps that each client adds to what it holds.

``receive.py`` is the way up, this is the way down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor

from gradcodec.delivery import Delivery, Parcel
from gradcodec.state import State
from strategies.outcomes import Downlink
from strategies.wire import HELD, HELD_BEFORE, wrap_adapter, wrap_bundle

Adapter = dict[str, Tensor]


class Broadcaster(Protocol):
    """What goes to a client so that it starts a round from the global adapter."""

    def outgoing(self, partition: int, current: Mapping[str, Tensor]) -> tuple[ArrayRecord, ConfigRecord, Downlink]:
        """The arrays and config entries for one client, and what they take; its round is 0."""
        ...

    def repair(self, partition: int, lacks: str) -> tuple[ArrayRecord, ConfigRecord, Downlink] | None:
        """The same for a client that says that it holds something else (``Held.claim``); None: that cannot be."""
        ...

    def settle(self, current: Mapping[str, Tensor], new: Adapter) -> tuple[Adapter, Adapter]:
        """The adapter that all hold after a round which came to ``new``, and the step which led to it, as clients know
        it. Called once a round, when it is done."""
        ...

    def answered(self, partition: int) -> None:
        """The client has taken in what it was sent."""
        ...

    def foresee(self, side: Tensor | None) -> Tensor | None:
        """The codec's side information of the first round, before there is any global update, as clients will know
        it."""
        ...

    def missing_bytes(self, partition: int) -> int:
        """What would bring a client to what is held now."""
        ...

    def state(self) -> State: ...

    def load_state(self, state: State) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""
        ...


class DenseBroadcaster:
    """The adapter in float32, to everybody in every round."""

    def __init__(self) -> None:
        self._packed: tuple[Mapping[str, Tensor], ArrayRecord] | None = None
        self._size = 0

    def outgoing(self, partition: int, current: Mapping[str, Tensor]) -> tuple[ArrayRecord, ConfigRecord, Downlink]:
        if self._packed is None or self._packed[0] is not current:  # one for all clients of a round
            record = wrap_adapter({name: tensor.numpy() for name, tensor in current.items()})
            self._packed, self._size = (current, record), _size_of(record)
        return self._packed[1], ConfigRecord(), Downlink(0, partition, step_bytes=self._size)

    def repair(self, partition: int, lacks: str) -> None:
        return None

    def settle(self, current: Mapping[str, Tensor], new: Adapter) -> tuple[Adapter, Adapter]:
        self._packed = None
        return new, {name: new[name] - tensor for name, tensor in current.items()}

    def answered(self, partition: int) -> None:
        """Everybody is sent everything."""

    def foresee(self, side: Tensor | None) -> Tensor | None:
        """It travels with every message."""
        return side

    def missing_bytes(self, partition: int) -> int:
        return self._size

    def state(self) -> State:
        return State()

    def load_state(self, state: State) -> None:
        """There is none."""


class CodedBroadcaster:
    """Coded steps: ``gradcodec.delivery`` in Flower's records."""

    def __init__(self, delivery: Delivery) -> None:
        self.delivery = delivery
        self._records: dict[bytes, ArrayRecord] = {}  # clients that are sent the same share it

    def outgoing(self, partition: int, current: Mapping[str, Tensor]) -> tuple[ArrayRecord, ConfigRecord, Downlink]:
        return self._sent(partition, self.delivery.outgoing(partition))

    def repair(self, partition: int, lacks: str) -> tuple[ArrayRecord, ConfigRecord, Downlink]:
        return self._sent(partition, self.delivery.repair(partition, lacks))

    def settle(self, current: Mapping[str, Tensor], new: Adapter) -> tuple[Adapter, Adapter]:
        self._records.clear()
        return self.delivery.settle({name: new[name] for name in current})

    def answered(self, partition: int) -> None:
        self.delivery.answered(partition)

    def foresee(self, side: Tensor | None) -> Tensor | None:
        return self.delivery.foresee(side)

    def missing_bytes(self, partition: int) -> int:
        return self.delivery.missing_bytes(partition)

    def state(self) -> State:
        return self.delivery.state()

    def load_state(self, state: State) -> None:
        self.delivery.load_state(state)

    def _sent(self, partition: int, parcel: Parcel) -> tuple[ArrayRecord, ConfigRecord, Downlink]:
        broadcast = parcel.broadcast
        if broadcast.bundle not in self._records:
            self._records[broadcast.bundle] = wrap_bundle(broadcast.bundle)
        config = ConfigRecord({HELD_BEFORE: broadcast.held_before, HELD: broadcast.held})
        sizes = parcel.step_bytes, parcel.catch_up_bytes, parcel.snapshot_bytes
        return self._records[broadcast.bundle], config, Downlink(0, partition, *sizes)


def _size_of(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())
