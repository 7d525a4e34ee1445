"""Payloads become dense parameters, then any Flower strategy does what it does.

``CodedStrategy(FedAvg(), codec)`` decodes every payload into an update, adds the adapter that the round started
from, and hands that to FedAvg: the inner strategy never learns that the wire was coded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from logging import INFO

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore import log
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.exchange import decode_blocks, digest_of
from strategies.records import ACCEPTED, ARRAYS, CONFIG, SIDE, array_of, unwrap_payload
from strategies.tensors import check_values, from_record, to_record
from strategies.wrapping import FacingClients


class CodedStrategy(FacingClients):
    """Decodes what clients encoded.

    Every message tells its client which of its payloads was accepted last, so that the mass of a payload that was
    lost or refused goes back into the client's residual. A payload that cannot be decoded is left out of the round.
    """

    def __init__(self, inner: Strategy, codec: Codec, min_replies: int = 1, max_bytes: int | None = None) -> None:
        """``max_bytes``: what a payload may take; None, for a codec of one rate: a little more than a dense update."""
        super().__init__(inner, min_replies)
        self.codec = codec
        self.max_bytes = max_bytes or 4 * codec.layout.num_parameters + 4096
        self.accepted: dict[int, str] = {}  # node id -> digest of its last accepted payload
        self.side: Tensor | None = None  # the codec's side information of the next round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        side = ArrayRecord() if self.side is None else to_record({SIDE: self.side})
        for message in super().configure_train(server_round, arrays, config, grid):
            node = message.metadata.dst_node_id
            own_config = ConfigRecord({**message.content.config_records[CONFIG], ACCEPTED: self.accepted.get(node, "")})
            message.content = RecordDict({**message.content, SIDE: side, CONFIG: own_config})
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        taken: dict[int, str] = {}
        decoded = self.enough(server_round, self._decoded(replies, taken))
        arrays, metrics = super().aggregate_train(server_round, decoded)
        self.accepted |= taken  # only now: if the round failed, every client's mass stays with it
        if arrays is not None:
            step = from_record(arrays)
            for name, tensor in self.current.items():
                step[name].sub_(tensor)
            self.side = self.codec.side_information(self.codec.layout.to_blocks(step))
        return arrays, metrics

    def _decoded(self, replies: Iterable[Message], taken: dict[int, str]) -> Iterator[Message]:
        """Every reply that can be decoded, its payload replaced by the adapter it stands for. Notes its digest."""
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                payload = unwrap_payload(reply.content)
                adapter = self._adapter_of(payload)
            except CodecError as error:
                self.refuse(node, f"{error}. Its mass stays with the client")
                continue
            taken[node] = digest_of(payload)
            reply.content = RecordDict({**reply.content, ARRAYS: adapter})
            yield reply

    def _adapter_of(self, payload: bytes) -> ArrayRecord:
        """The adapter that a payload stands for; beside it, only its blocks are ever held. Raises CodecError."""
        if len(payload) > self.max_bytes:
            raise CodecError(f"its payload takes {len(payload)} bytes, and {self.max_bytes} are the most of this run")
        blocks_RC = decode_blocks(payload, codec=self.codec, side=self.side).cpu()
        arrays: dict[str, Array] = {}  # no ArrayRecord: those are cycles, which live on
        for name, tensor in self.codec.layout.tensors(blocks_RC):
            tensor.add_(self.current[name])
            check_values(name, tensor)
            arrays[name] = array_of(tensor.numpy())
        return ArrayRecord({name: arrays[name] for name in self.current})  # strategies zip them by position

    def summary(self) -> None:
        log(INFO, "\t├──> %s, id %s", type(self.codec).__name__, self.codec.id.hex())
        super().summary()
