"""The server's side of the way up: payloads become updates, each counted once, in its own place.

``delivery.py`` is the way down, ``client.py`` the other end. Knows no Flower.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_blocks
from gradcodec.frame import has_context
from gradcodec.state import State, pairs, table_of
from gradcodec.transfers import context_of

GUESSED_CONTEXTS = 256
"""For how many other rounds and clients a payload that is refused is tried, to say where it belongs."""
_SIDE = "side"


class Intake:
    """Decodes what clients encoded.

    ``accepted`` is what each client is told: the digest of its last payload that was used, so that what a payload
    carried that was lost or refused goes back into the client's residual. ``side`` is the codec's side information of
    the next round.
    """

    def __init__(
        self,
        codec: Codec,
        run_id: str,
        clients: Collection[int],
        max_bytes: int | None = None,
    ) -> None:
        """
        Args:
            codec: what stays the same over all rounds of it: layout and side information.
            run_id: goes into every payload's checksum.
            clients: numbers of all that take part.
            max_bytes: what a payload may take; None, for a codec of one rate: a little more than a dense update.
        """
        self.codec = codec
        self.layout = codec.layout
        self.run_id = run_id
        self.clients = clients
        self.max_bytes = max_bytes or 4 * codec.layout.num_parameters + 4096
        self.accepted: dict[int, str] = {}
        self.side: Tensor | None = None

    def blocks_of(self, payload: bytes, client: int, server_round: int, codec: Codec) -> Tensor:
        """The update that a client sent in a round whose codec this is, as blocks ``[R, C]`` on the CPU. Raises
        CodecError: it is none, or not this client's of this round."""
        if len(payload) > self.max_bytes:
            raise CodecError(f"its payload takes {len(payload)} bytes, and {self.max_bytes} are the most of this run")
        context = context_of(self.run_id, server_round, client)
        try:
            return decode_blocks(payload, codec=codec, side=self.side, context=context).cpu()
        except CodecError as error:
            raise CodecError(
                f"{self._belongs(payload, client, server_round) or error}. What it carries stays with the client"
            ) from None

    def used(self, digests: Mapping[int, str], step: Mapping[str, Tensor]) -> None:
        """A round is done: the payloads of these digests were used, client by client, and the adapter changed by
        ``step``."""
        self.accepted |= digests
        self.foresee(step)

    def foresee(self, step: Mapping[str, Tensor]) -> None:
        """Side information, as if the last global update had been ``step``."""
        self.side = self.codec.side_information(self.layout.to_blocks(step))

    def state(self) -> State:
        """All that is remembered from round to round."""
        return State({"accepted": pairs(self.accepted)}, {} if self.side is None else {_SIDE: self.side})

    def load_state(self, state: State) -> None:
        """Inverse of ``state``. Raises ValueError or KeyError: it is none."""
        self.accepted, self.side = table_of(state.values["accepted"], str), state.tensors.get(_SIDE)

    def _belongs(self, payload: bytes, client: int, server_round: int) -> str:
        """Where a payload belongs that is whole but was not made for this round and client; empty: nowhere we know."""
        for other_round, other in self._other_places(client, server_round):
            if has_context(payload, context_of(self.run_id, other_round, other)):
                return f"its payload is that of partition {other} in round {other_round}, sent again"
        return ""

    def _other_places(self, client: int, server_round: int) -> Iterator[tuple[int, int]]:
        """This client's earlier rounds, the last one first; then the others of this round."""
        earlier = range(server_round - 1, max(0, server_round - 1 - GUESSED_CONTEXTS), -1)
        yield from ((other, client) for other in earlier)
        others: Iterable[int] = (one for one, _ in zip(self.clients, range(GUESSED_CONTEXTS), strict=False))
        yield from ((server_round, other) for other in others if other != client)
