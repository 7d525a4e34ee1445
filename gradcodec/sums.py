"""What both ends of a sum have in common, and what the server remembers of sums: ``linear.py`` between rounds.

``intake.py`` and ``client.py`` are the ends where the server sees every client's payload. Here it sees a round's sum
alone, so that it can tell nobody apart: all that is kept is the sum's strength, and whose contributions are in it.
Knows neither masks nor Flower.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradcodec.announcement import Announcement
from gradcodec.bands import edges_of
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.expected import NUM_CLASSES
from gradcodec.layout import Layout
from gradcodec.linear import Basis, LinearCode, Terms, announce_first
from gradcodec.residues import Integers
from gradcodec.rounds import Codecs
from gradcodec.state import State, pairs, table_of

_SIDE, _ANNOUNCED = "side", "announced"


@dataclass(frozen=True)
class PublicRound:
    """All that a round's linear code depends on beside adapter and settings. It is no secret."""

    server_round: int
    terms: Terms
    announcement: bytes  # as ``Announcement.pack`` gives it

    def code(self, basis: Basis, run_id: str) -> LinearCode:
        """Raises CodecError: the announcement is of another layout, or the terms cannot be served."""
        num_bands = len(edges_of(basis.layout.num_parameters)) - 1
        announcement = Announcement.unpack(self.announcement, basis.num_rows, NUM_CLASSES, num_bands)
        return LinearCode(basis, self.terms, announcement, _seed_of(run_id, self.server_round))


def _seed_of(run_id: str, server_round: int) -> bytes:
    """Of dithers, orders and rotations: another one in every round."""
    return f"{run_id}/{server_round}".encode()


def basis_at(codecs: Codecs, adapter: Mapping[str, Tensor], layout: Layout, side: Tensor | None) -> Basis:
    """Of the round that starts from this adapter. Raises CodecError: the codec is not ``learned``, whose tables say
    where updates are strong."""
    tables = codecs.tables_at(adapter)
    if tables is None:
        raise CodecError("sums are coded with the tables of codec=learned: choose that codec")
    return Basis(layout, tables, side)


class SumIntake:
    """The server's memory of sums. ``accepted`` is what each client is told: which of its contributions was last in a
    sum that was opened; of any other, all that it carried goes back into the client's residual."""

    def __init__(self, codec: Codec, run_id: str) -> None:
        """
        Args:
            codec: what stays the same over all rounds of it: layout and side information.
            run_id: goes into every seed.
        """
        self.codec = codec
        self.layout = codec.layout
        self.run_id = run_id
        self.accepted: dict[int, str] = {}
        self.side: Tensor | None = None
        self.announced: bytes | None = None  # for the next round
        self._foreseen: Tensor | None = None

    def foresee(self, step: Mapping[str, Tensor]) -> None:
        """What a client's first update may be like: an announcement needs something to go by."""
        self._foreseen = self.layout.to_blocks(step).cpu()
        self.side = self.codec.side_information(self._foreseen)

    def begin(self, server_round: int, terms: Terms, basis: Basis) -> PublicRound:
        """What a round's clients are told.

        Raises:
            CodecError: nothing is known of the updates to come.
        """
        if self.announced is None:
            if self._foreseen is None:
                raise CodecError(
                    "nothing is known yet of how strong updates are: give federation.rehearsal_steps more than 0"
                )
            seed = _seed_of(self.run_id, server_round)
            self.announced = announce_first(basis, terms, self._foreseen, seed).pack()
        return PublicRound(server_round, terms, self.announced)

    def opened(self, code: LinearCode, total_S: Integers, clients: Sequence[int]) -> dict[str, Tensor]:
        """A round's sum -> the mean of what is in it, and what the next round is announced.

        Args:
            code: of the round.
            total_S: the sum modulo ``code.modulus``.
            clients: whose contributions are in it.
        """
        sum_RC = code.decode_sum(total_S, clients)
        self.announced = code.announce_next(total_S, clients).pack()
        return dict(self.layout.tensors(sum_RC / len(clients)))

    def used(self, clients: Collection[int], identity: str, step: Mapping[str, Tensor]) -> None:
        """A round is done: these clients' contributions to the sum of this name are in the adapter, which changed by
        ``step``."""
        self.accepted |= dict.fromkeys(clients, identity)
        self.side = self.codec.side_information(self.layout.to_blocks(step))

    def state(self) -> State:
        """All that is remembered from round to round."""
        announced = "" if self.announced is None else self.announced.hex()
        tensors = {} if self.side is None else {_SIDE: self.side}
        return State({"accepted": pairs(self.accepted), _ANNOUNCED: announced}, tensors)

    def load_state(self, state: State) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""
        self.accepted, self.side = table_of(state.values["accepted"], str), state.tensors.get(_SIDE)
        self.announced = bytes.fromhex(state.values[_ANNOUNCED]) or None
