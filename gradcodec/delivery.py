"""The server's side of the way down: what every client is sent so that it holds what the server holds.

``broadcast.py`` has the format of what is sent, ``intake.py`` the way up, ``client.py`` the other end. Knows no Flower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradcodec.broadcast import (
    Held,
    coarse_side,
    encode_step,
    key_bytes,
    pack_bundle,
    pack_snapshot,
    start_digest,
)
from gradcodec.exchange import Residual
from gradcodec.fidelity import inner_product
from gradcodec.layout import Layout
from gradcodec.rounds import CodecAt
from gradcodec.state import State, pairs, table_of
from gradcodec.transfers import Broadcast, broadcast_context

Adapter = dict[str, Tensor]
SNAPSHOT_BITS = 4
"""Of steps a parameter: as long as a client has missed less, no snapshot is made to compare with it."""
LIKELY_SNAPSHOT_BITS = 9
"""A parameter: no client is sent more for what it has missed, about."""
MOST_LEFT_OUT = 4.0
"""Of a step's energy, by a key. Codecs whose error is a share of what they code would set all clients back with it."""


@dataclass(frozen=True)
class Parcel:
    """What one client is sent, and what its bytes are for."""

    broadcast: Broadcast
    step_bytes: int  # of the last step, and of what is beside the others
    catch_up_bytes: int  # of steps before the last one, which the client missed
    snapshot_bytes: int  # of all that is held, for who holds nothing, or of a key


class Delivery:
    """Steps as payloads; what of them a client has missed it is sent from a log, or a snapshot where that is smaller.

    States are counted from 0, the start; step ``n`` leads from state ``n`` to the next one, or from a key that stands
    for it and all before: one is made when clients together have missed more than a key for each would take. What a
    client holds is known from its last reply; a client that holds something else says so, and is sent what it needs in
    the same round.
    """

    def __init__(
        self,
        codec_at: CodecAt,
        layout: Layout,
        start: Mapping[str, Tensor],
        run_id: str,
        max_bytes: int | None,
        clients: Collection[int],
        *,
        start_is_known: bool = True,
    ) -> None:
        """
        Args:
            codec_at: the codec of every round.
            layout: of the adapter.
            start: the adapter that the run starts from.
            run_id: goes into every step's checksum.
            max_bytes: what a step may take; None: the codec's own rate.
            clients: numbers of all that take part; more may come, if it grows.
            start_is_known: clients make the start adapter themselves, from the seed.
        """
        self.codec_at = codec_at
        self.layout = layout
        # what every client makes itself, once it has the start adapter: where keys begin
        self._origin = self.held = self._first = Held.at_start(layout.to_blocks(start))
        self.max_bytes = max_bytes
        self.clients = clients
        self._context = broadcast_context(run_id)
        self._start_is_known = start_is_known
        self._residual_RC: Tensor | None = None
        self._number = 0  # of the state that is held
        self._steps: dict[int, bytes] = {}
        self._key: tuple[int, bytes] | None = None  # the state that the last key stands for
        self._digests: dict[int, str] = {}  # of the states before the steps that are kept, and of the last one
        self._of_clients: dict[int, int] = {}  # partition -> the state that it holds
        self._packed: dict[tuple[int | None, bool, bool], Parcel] = {}  # what was made of the state that is held
        self._snapshots: dict[bool, bytes] = {}  # of it, with the start or not
        self._note_state()

    def outgoing(self, client: int) -> Parcel:
        """What it is sent at the beginning of a round. Clients that are sent the same share it."""
        return self._parcel(*self._before(client))

    def repair(self, client: int, claim: str) -> Parcel:
        """The same for one that says that it holds something else (``Held.claim``)."""
        digest, _, start = claim.partition("/")
        same_start = start == start_digest(self.held.start_RC)
        known = {digest: number for number, digest in self._digests.items()}.get(digest)
        has_start = known is not None or same_start
        begun = self.outgoing(client).broadcast.held_before
        # it could begin from there, and did not come to what is held
        could_not = begun in ("", digest) or (begun == self._origin.digest and same_start)
        self._of_clients.pop(client, None)
        return self._parcel(known, not has_start, whole=could_not)

    def settle(self, new: Mapping[str, Tensor]) -> tuple[Adapter, Adapter]:
        """The adapter that all hold after a round which came to ``new``, and the step which led to it, as clients know
        it. Called once a round, when it is done."""
        step_RC = self.layout.to_blocks(new)
        step_RC -= self.held.adapter_RC
        key, before = self._key_that_pays(step_RC) or (None, self.held)
        step_RC -= before.moved_RC - self.held.moved_RC
        step, self.held, residual = self._encoded(step_RC, self._residual_RC, before, self.max_bytes)
        self._residual_RC = residual.error_RC
        if key is not None:
            self._key = self._number, key
            self._steps.clear()
        self._steps[self._number] = step
        self._number += 1
        self._note_state()
        self._forget()
        adapter = self.layout.to_update(self.held.adapter_RC)
        settled = self.layout.to_update(self.held.moved_RC - before.moved_RC)
        return {name: adapter[name] for name in new}, settled

    def answered(self, client: int) -> None:
        """It has taken in what it was sent."""
        self._of_clients[client] = self._number

    def foresee(self, side: Tensor | None) -> Tensor | None:
        """The codec's side information of the first round, before there is any global update, as clients will know
        it."""
        assert self._number == 0
        side = None if side is None else coarse_side(side)
        self.held = self._first = replace(self._origin, side=side)
        self._note_state()
        return side

    def missing_bytes(self, client: int) -> int:
        """What would bring it to what is held now."""
        return len(self.outgoing(client).broadcast.bundle)

    def state(self) -> State:
        """All that is remembered from round to round."""
        tensors = {"moved": self.held.moved_RC}
        if self._residual_RC is not None:
            tensors["residual"] = self._residual_RC
        if self.held.side is not None:
            tensors["side"] = self.held.side
        if self._first.side is not None:
            tensors["first-side"] = self._first.side
        for number, step in self._steps.items():
            tensors[f"step/{number}"] = torch.frombuffer(bytearray(step), dtype=torch.uint8)
        if self._key is not None:
            tensors[f"key/{self._key[0]}"] = torch.frombuffer(bytearray(self._key[1]), dtype=torch.uint8)
        values = {"number": self._number, "digests": pairs(self._digests), "clients": pairs(self._of_clients)}
        return State(values, tensors)

    def load_state(self, state: State) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""
        tensors = state.tensors
        self._first = replace(self._origin, side=tensors.get("first-side"))
        self.held = Held(self.held.start_RC, tensors["moved"], tensors.get("side"))
        if self.held.moved_RC.shape != self.held.start_RC.shape:
            raise ValueError(f"an adapter that moved by {tuple(self.held.moved_RC.shape)} is another one")
        self._residual_RC = tensors.get("residual")
        self._number = int(state.values["number"])
        self._digests = table_of(state.values["digests"], str)
        self._of_clients = table_of(state.values["clients"], int)
        if any((tensor.dtype == torch.uint8) != key.startswith(("step/", "key/")) for key, tensor in tensors.items()):
            raise ValueError("a step or a key is not bytes, or something else is")
        self._steps = _numbered(tensors, "step/")
        self._key = next(iter(_numbered(tensors, "key/").items()), None)
        if self._digests.get(self._number) != self.held.digest:
            raise ValueError("the state that all hold is not the one that it was")

    def _encoded(
        self, step_RC: Tensor, carried_RC: Tensor | None, held: Held, max_bytes: int | None
    ) -> tuple[bytes, Held, Residual]:
        return encode_step(
            step_RC,
            carried_RC,
            held=held,
            codec=self.codec_at(held),
            max_bytes=max_bytes,
            context=self._context,
        )

    def _key_that_pays(self, step_RC: Tensor) -> tuple[bytes, Held] | None:
        """A key of the state that is held, what steps left out of it put in, and what it leads to; None: all clients
        together have missed less than a key for each, or the codec leaves out too much of so large a movement."""
        states = Counter(self._of_clients.get(client, 0) for client in self.clients)
        snapshot = self.layout.num_parameters * LIKELY_SNAPSHOT_BITS // 8
        missed = sum(count * min(self._bytes_since(number), snapshot) for number, count in states.items())
        if missed == 0:
            return None
        wanted_RC = self.held.moved_RC if self._residual_RC is None else self.held.moved_RC + self._residual_RC
        most = None if self.max_bytes is None else key_bytes(wanted_RC, step_RC, self.layout, self.max_bytes)
        likely = max(map(len, self._steps.values()), default=0) if most is None else most  # one rate: as a step
        if missed <= len(self.clients) * likely:
            return None
        key, held, residual = self._encoded(wanted_RC, None, self._origin, most)
        left_out = inner_product(residual.error_RC, residual.error_RC)
        return (key, held) if left_out <= MOST_LEFT_OUT * inner_product(step_RC, step_RC) else None

    def _bytes_since(self, number: int) -> int:
        """What leads on from a state to the one that is held."""
        key = self._key_before(number)
        steps = sum(len(step) for one, step in self._steps.items() if one >= number)
        return steps if key is None else len(key[1]) + steps

    def _key_before(self, number: int | None) -> tuple[int, bytes] | None:
        """The key that a client of that state needs, and the state that it stands for; None: it needs none."""
        return self._key if self._key is not None and (number is None or number <= self._key[0]) else None

    def _own_state(self) -> int | None:
        """What a client holds that was never heard of: the start, if it can make that itself."""
        return 0 if self._start_is_known and self._first.side is None else None

    def _before(self, client: int) -> tuple[int | None, bool]:
        """The state that a client is taken to hold, None: nothing, and whether it needs the start adapter, too."""
        number = self._of_clients.get(client, self._own_state())
        return number, number is None and not self._start_is_known

    def _parcel(self, number: int | None, with_start: bool, whole: bool = False) -> Parcel:
        """From a state to the one that is held; None: from nothing; ``whole``: without steps, which the client could
        not take in."""
        if whole or self._key_before(number) is not None:
            number = None
        asked = number, with_start, whole
        if asked not in self._packed:
            self._packed[asked] = self._pack(*asked)
        return self._packed[asked]

    def _pack(self, number: int | None, with_start: bool, whole: bool) -> Parcel:
        if (key := self._key_before(number)) is not None:
            before, keys, number = self._origin.digest, [key[1]], key[0]
            snapshot = pack_snapshot(self._origin, self.layout, True) if with_start else b""
        else:
            before, keys = self._digests.get(number or 0, ""), []
            snapshot = b"" if number is not None else pack_snapshot(self._first, self.layout, with_start)
        steps = None if whole else self._steps_from(number or 0)
        size = len(snapshot) + sum(map(len, [*keys, *(steps or [])]))
        if steps is None or size > self.layout.num_parameters * SNAPSHOT_BITS // 8:
            all_of_it = self._snapshot_of(with_start)
            if steps is None or len(all_of_it) < size:
                snapshot, keys, steps = all_of_it, [], []
        bundle = pack_bundle(snapshot, [*keys, *steps])
        from_the_start = len(snapshot) + sum(map(len, keys))
        beside = len(bundle) - from_the_start - sum(map(len, steps))
        return Parcel(
            Broadcast(bundle, "" if snapshot else before, self.held.digest),
            step_bytes=(len(steps[-1]) if steps else 0) + beside,
            catch_up_bytes=sum(map(len, steps[:-1])),
            snapshot_bytes=from_the_start,
        )

    def _steps_from(self, number: int) -> list[bytes] | None:
        """Those that lead on from a state; None: they are not kept any more."""
        numbers = range(number, self._number)
        return [self._steps[one] for one in numbers] if all(one in self._steps for one in numbers) else None

    def _snapshot_of(self, with_start: bool) -> bytes:
        if with_start not in self._snapshots:
            self._snapshots[with_start] = pack_snapshot(self.held, self.layout, with_start)
        return self._snapshots[with_start]

    def _note_state(self) -> None:
        self._digests[self._number] = self.held.digest
        self._packed.clear()
        self._snapshots.clear()

    def _forget(self) -> None:
        """Steps that together take more than the adapter itself: nobody will be sent them."""
        kept = 0
        for number in sorted(self._steps, reverse=True):
            kept += len(self._steps[number])
            if kept > 4 * self.layout.num_parameters:
                del self._steps[number]
        if self._key is not None and self._key[0] not in self._steps:
            self._key = None
        self._digests = {n: d for n, d in self._digests.items() if n in self._steps or n in (0, self._number)}


def _numbered(tensors: Mapping[str, Tensor], head: str) -> dict[int, bytes]:
    return {int(k.removeprefix(head)): t.numpy().tobytes() for k, t in tensors.items() if k.startswith(head)}
