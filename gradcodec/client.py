"""A client's side of coded transfers: it comes to hold what the server holds, and encodes what its training changed.

``delivery.py`` and ``intake.py`` are the other end. Where a client keeps what it must remember between messages is
``Memory``'s business. Knows no Flower.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from gradcodec.broadcast import Held, catch_up, unpack_bundle
from gradcodec.build import byte_budget
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import Residual, encode_update
from gradcodec.layout import Layout
from gradcodec.linear import LinearCode
from gradcodec.residues import Integers
from gradcodec.rounds import CodecAt
from gradcodec.settings import CodecSettings
from gradcodec.transfers import Broadcast, broadcast_context, context_of

_LOG = logging.getLogger(__name__)


class LacksError(Exception):
    """A client does not hold what a broadcast starts from; ``holds`` is its claim of what it does (``Held.claim``)."""

    def __init__(self, holds: str) -> None:
        super().__init__(f"it holds {holds}")
        self.holds = holds


class Memory(Protocol):
    """What a client remembers between messages. What cannot be read is nothing."""

    def load_held(self, layout: Layout, start_RC: Tensor) -> Held:
        """What it holds; if there is nothing that can be used, the start of a run: blocks ``[R, C]``."""
        ...

    def save_held(self, held: Held) -> None:
        """Inverse of ``load_held``. A place that takes nothing costs a snapshot in the next round, not this one."""
        ...

    def load_residual(self, layout: Layout, server_round: int) -> Residual | None:
        """What the last round before ``server_round`` left; None: nothing that fits."""
        ...

    def save_residual(self, layout: Layout, server_round: int, residual: Residual) -> None:
        """Inverse of ``load_residual``; the last thing a client does before it replies."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a payload counts, and what both ends know of it."""

    client: int
    server_round: int
    side: Tensor | None  # the codec's side information of the round
    accepted: str  # digest of the client's last payload that the server used
    bits: float | None = None  # a parameter, for a client that sends fewer than the others; None: as the settings say
    rank: int | None = None  # it trains the first so many rows of every block, and no others count; None: all


class ClientEnd:
    """One run's, for all clients on a machine."""

    def __init__(self, codec_at: CodecAt, layout: Layout, settings: CodecSettings, run_id: str) -> None:
        """
        Args:
            codec_at: the codec of every round.
            layout: of the adapter.
            settings: budget and error feedback count.
            run_id: goes into every payload's checksum.
        """
        self.codec_at = codec_at
        self.layout = layout
        self.settings = settings
        self.run_id = run_id

    def take_in(self, broadcast: Broadcast, memory: Memory, start_RC: Tensor) -> Held:
        """What is held after a broadcast, and from now on.

        Args:
            broadcast: as received; nothing of it is taken on trust.
            memory: of the client it was sent to.
            start_RC: the adapter from which a run starts that the client knows nothing of, ``[R, C]``.

        Raises:
            LacksError: the broadcast does not lead from what it holds, or from the run's start, to what it should.
        """
        before = memory.load_held(self.layout, start_RC)
        held = take_in(broadcast, before, self.layout, self.codec_at, broadcast_context(self.run_id))
        if held is not before:
            memory.save_held(held)
        return held

    def encode(self, update: Mapping[str, Tensor], memory: Memory, place: Place, codec: Codec) -> bytes:
        """What local training changed -> payload, by the round's codec; what it leaves out goes into the memory.

        A client of a lower rank has as many bytes as it trains parameters for. Rows beyond its rank are not counted of
        what is decoded, there and here: what an earlier round of a higher rank left of them stays in the memory.

        Raises:
            CodecError: the update is not finite, or does not fit the layout.
            BudgetError: no payload of so few bytes can be made.
        """
        layout = self.layout
        payload, residual = encode_update(
            update,
            self._carried(memory, place),
            codec=codec,
            max_bytes=self._most_bytes(place),
            snr_db=self.settings.snr_db,
            side=place.side,
            context=context_of(self.run_id, place.server_round, place.client),
        )
        if self.settings.feedback > 0:
            if place.rank is not None:
                residual.error_RC[place.rank :] = residual.target_RC[place.rank :]
            memory.save_residual(layout, place.server_round, residual)
        return payload

    def _most_bytes(self, place: Place) -> int | None:
        """Of one payload."""
        settings = self.settings if place.bits is None else replace(self.settings, bits=place.bits)
        return byte_budget(settings, self.layout, place.rank)

    def encode_for_sum(
        self, update: Mapping[str, Tensor], memory: Memory, place: Place, code: LinearCode, identity: str
    ) -> Integers:
        """The same into integers ``[S]`` that add up with other clients', by the round's linear code.

        Args:
            identity: how the server will name the sum, should this be in it.

        Raises:
            CodecError: the update is not finite, or does not fit the layout.
        """
        target_RC = self.layout.to_blocks(update).cpu()
        if (carried_RC := self._carried(memory, place)) is not None:
            target_RC += carried_RC.cpu()
        integers_S = code.encode(target_RC, place.client)
        if self.settings.feedback > 0:
            left_RC = target_RC - code.decode_own(integers_S, place.client)
            memory.save_residual(self.layout, place.server_round, Residual(target_RC, left_RC, identity))
        return integers_S

    def _carried(self, memory: Memory, place: Place) -> Tensor | None:
        """What earlier rounds left to this one."""
        feedback = self.settings.feedback
        if feedback <= 0 or (old := memory.load_residual(self.layout, place.server_round)) is None:
            return None
        return old.carried(place.accepted, feedback)


def take_in(broadcast: Broadcast, held: Held, layout: Layout, codec_at: CodecAt, context: bytes) -> Held:
    """What is held after a broadcast; the same object, if that is what is held already.

    Args:
        codec_at: the codec of the round that starts from such a state.
        context: names the run.

    Raises:
        LacksError: the broadcast starts neither from what is held nor from the run's start, or does not lead to what it
            should.
    """
    if held.digest == broadcast.held:
        return held
    first = held if broadcast.held_before in ("", held.digest) else Held.at_start(held.start_RC)  # where keys begin
    if broadcast.held_before not in ("", first.digest):
        raise LacksError(held.claim)
    try:
        bundle = unpack_bundle(broadcast.bundle)
        after = catch_up(first, bundle, layout=layout, codec_at=codec_at, context=context)
    except CodecError as error:
        _LOG.warning("the server's broadcast does not fit what is held here: %s", error)
        raise LacksError(held.claim) from None
    if after.digest != broadcast.held:
        raise LacksError(held.claim)
    return after
