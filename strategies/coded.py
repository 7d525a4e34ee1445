"""The coded arm's receiver: payloads become adapters. The dense one's twin is ``dense.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_blocks
from gradcodec.frame import has_context
from gradcodec.rounds import Codecs, SameCodec
from strategies.outcomes import Uplink
from strategies.receive import Adapter, Asked
from strategies.state import State, pairs, table_of
from strategies.tensors import check_values, to_record
from strategies.wire import ACCEPTED, SIDE, context_of, unwrap_payload

GUESSED_CONTEXTS = 256
"""For how many other rounds and clients a payload that is refused is tried, to say where it belongs."""


class CodedReceiver:
    """Decodes what clients encoded, and adds the adapter that the round started from.

    Every message tells its client which of its payloads was accepted last, so that what a payload carried that was lost
    or refused goes back into the client's residual.
    """

    def __init__(
        self,
        codec: Codec,
        run_id: str,
        num_partitions: int,
        max_bytes: int | None = None,
        codecs: Codecs | None = None,
        sends_side: bool = True,
    ) -> None:
        """
        Args:
            codec: what stays the same over all rounds of it: layout and side information.
            run_id: goes into every payload's checksum.
            num_partitions: how many clients there are.
            max_bytes: what a payload may take; None, for a codec of one rate: a little more than a dense update.
            codecs: the codec of every round; None: ``codec`` itself.
            sends_side: clients do not find the codec's side information out by themselves.
        """
        self.codec = codec
        self.codecs = codecs or SameCodec(codec)
        self.run_id = run_id
        self.num_partitions = num_partitions
        self.max_bytes = max_bytes or 4 * codec.layout.num_parameters + 4096
        self.accepted: dict[int, str] = {}  # partition -> digest of its last accepted payload
        self.sends_side = sends_side
        self.side: Tensor | None = None  # the codec's side information of the next round

    def outgoing(self, partition: int) -> tuple[RecordDict, ConfigRecord]:
        records = RecordDict()  # every record costs a node requests of its own
        if self.side is not None and self.sends_side:
            records[SIDE] = to_record({SIDE: self.side})
        return records, ConfigRecord({ACCEPTED: self.accepted.get(partition, "")})

    def adapter_of(self, content: RecordDict, asked: Asked, current: Mapping[str, Tensor]) -> Adapter:
        """Beside the adapter, only its blocks are ever held."""
        payload = unwrap_payload(content)
        if len(payload) > self.max_bytes:
            raise CodecError(f"its payload takes {len(payload)} bytes, and {self.max_bytes} are the most of this run")
        context = context_of(self.run_id, asked.server_round, asked.partition)
        try:
            blocks_RC = decode_blocks(payload, codec=self.codecs.at(current), side=self.side, context=context).cpu()
        except CodecError as error:
            raise CodecError(
                f"{self._belongs(payload, asked) or error}. What it carries stays with the client"
            ) from None
        adapter = {}
        for name, tensor in self.codec.layout.tensors(blocks_RC):
            tensor.add_(current[name])
            check_values(name, tensor)
            adapter[name] = tensor
        return {name: adapter[name] for name in current}

    def foresee(self, step: Adapter) -> None:
        self.side = self.codec.side_information(self.codec.layout.to_blocks(step))

    def averaged(self, uplinks: Iterable[Uplink], step: Adapter) -> None:
        self.accepted |= {uplink.partition: uplink.payload_digest for uplink in uplinks}
        self.foresee(step)

    def state(self) -> State:
        tensors = {} if self.side is None else {SIDE: self.side}
        return State({"accepted": pairs(self.accepted)}, tensors)

    def load_state(self, state: State) -> None:
        self.accepted, self.side = table_of(state.values["accepted"], str), state.tensors.get(SIDE)

    def _belongs(self, payload: bytes, asked: Asked) -> str:
        """Where a payload belongs that is whole but was not made for this round and client; empty: nowhere we know."""
        for server_round, partition in self._other_places(asked):
            if has_context(payload, context_of(self.run_id, server_round, partition)):
                return f"its payload is that of partition {partition} in round {server_round}, sent again"
        return ""

    def _other_places(self, asked: Asked) -> Iterator[tuple[int, int]]:
        """This client's earlier rounds, the last one first; then the others of this round."""
        earlier = range(asked.server_round - 1, max(0, asked.server_round - 1 - GUESSED_CONTEXTS), -1)
        yield from ((server_round, asked.partition) for server_round in earlier)
        others = range(min(self.num_partitions, GUESSED_CONTEXTS))
        yield from ((asked.server_round, partition) for partition in others if partition != asked.partition)
