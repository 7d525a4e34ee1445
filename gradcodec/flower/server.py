"""The server's side of an app that is coded both ways: messages out, replies in, between any strategy and Flower.

What every client holds is followed by ``gradcodec.delivery``, what it sent is decoded by ``gradcodec.intake``; a reply
that cannot be read is left out with a warning, as one that never came.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from gradcodec.artifact import load_artifact
from gradcodec.build import artifact_folder, broadcast_budget, byte_budget
from gradcodec.delivery import Delivery, Parcel
from gradcodec.errors import CodecError
from gradcodec.exchange import digest_of
from gradcodec.flower.arrays import AppArrays
from gradcodec.flower.codecs import codec_of_rounds
from gradcodec.flower.turn import CODING, EXACT, HOLDS, LACKS, Turn
from gradcodec.flower.wire import BUNDLE, BUNDLE_TYPE, PAYLOAD, PAYLOAD_TYPE, from_one_array, in_one_array
from gradcodec.intake import Intake
from gradcodec.registry import entry_of
from gradcodec.rounds import CodecAt
from gradcodec.settings import CodecSettings, check_codec
from gradcodec.trial import check_budgets

_LOG = logging.getLogger(__name__)
NO_MOD = "is coded() among the mods of its ClientApp, and the first of them?"


class CodedRounds:
    """Follows one run from its first message on."""

    def __init__(self, settings: CodecSettings) -> None:
        """Raises CodecError: a setting is out of range, or there is no such codec."""
        check_codec(settings)
        self.settings = settings
        self.begin()

    def begin(self) -> None:
        """Another run, of which clients hold nothing."""
        self.run_id = secrets.token_hex(8)
        self.num_bytes = {"up": 0, "down": 0}  # of payloads, bundles and what travels as it is
        self._ends: _Ends | None = None

    def outgoing(
        self, messages: Iterable[Message], arrays: ArrayRecord, server_round: int, nodes: Iterable[int]
    ) -> list[Message]:
        """Messages that hold the arrays -> the same, each with what its client needs to hold them.

        Args:
            messages: of any strategy; what they hold beside the arrays is theirs.
            arrays: the global ones.
            server_round: of the messages.
            nodes: all that are connected.

        Raises:
            CodecError: the arrays cannot be coded, or a message holds others than the global ones.
        """
        messages = list(messages)
        if not messages:
            return []
        if self._ends is None:
            self._ends = _Ends(self.settings, self.run_id, arrays)
        self._ends.begin_round(server_round, nodes)
        self._ends.follow(arrays)
        for message in messages:
            _check_same(message, arrays)
            self._send(message, self._ends, server_round)
        return messages

    def decoded(self, replies: Iterable[Message]) -> Iterator[Message]:
        """Replies with payloads -> with the arrays that the clients came to."""
        for reply in self.heard(replies):
            node = reply.metadata.src_node_id
            if self._ends is not None and not reply.has_error():
                try:
                    self.num_bytes["up"] += _size_of(reply.content)
                    reply.content = self._ends.read(reply.content, node)
                except CodecError as error:
                    _LOG.warning("the reply of node %s is left out: %s", node, error)
                    continue
            yield reply

    def heard(self, replies: Iterable[Message]) -> Iterator[Message]:
        """The replies of clients that have taken in what they were sent; of the others it is noted what they hold."""
        for reply in replies:
            if self._ends is None or reply.has_error():
                if reply.has_error() and BUNDLE_TYPE in str(reply.error.reason):
                    _LOG.warning("a client took codes for arrays: %s", NO_MOD)
                yield reply
                continue
            node, lacks = reply.metadata.src_node_id, reply.content.config_records.get(LACKS)
            if lacks is None:
                self._ends.delivery.answered(node)
                yield reply
            else:
                _LOG.warning("node %s holds other arrays than the server: it is sent what it needs next time", node)
                self._ends.claims[node] = str(lacks.get(HOLDS, ""))

    def settle(self, arrays: ArrayRecord) -> ArrayRecord:
        """What a round came to -> what all hold after it; what of it a step leaves out goes into the next one."""
        assert self._ends is not None
        return self._ends.settle(arrays)

    def _send(self, message: Message, ends: _Ends, server_round: int) -> None:
        key = _key_of(message.content)
        parcel = ends.parcel(message.metadata.dst_node_id)
        turn = Turn(
            ends.settings,
            self.run_id,
            server_round,
            key,
            ends.intake.accepted.get(message.metadata.dst_node_id, ""),
            parcel.broadcast.held_before,
            parcel.broadcast.held,
            None if parcel.broadcast.held_before else ends.arrays,
        )
        ends.arrays_key = key
        bundle = in_one_array(BUNDLE, BUNDLE_TYPE, parcel.broadcast.bundle)
        exact = {EXACT: ends.exact} if ends.exact else {}
        message.content = RecordDict({**message.content, key: bundle, CODING: turn.pack(), **exact})
        self.num_bytes["down"] += _size_of(message.content)


class _Ends:
    """What is known once there are arrays."""

    def __init__(self, settings: CodecSettings, run_id: str, arrays: ArrayRecord) -> None:
        self.arrays = AppArrays.of(arrays)
        if entry_of(settings.name).needs_artifact:
            digest = load_artifact(artifact_folder(settings), settings.name).digest
            settings = replace(settings, digest=digest)
        self.settings = settings
        self.exact = self.arrays.exact_of(arrays)
        self.clients: set[int] = set()
        self.claims: dict[int, str] = {}  # of clients that hold something else
        self.server_round, self.arrays_key = 0, ""
        layout = self.arrays.layout
        codec_at: CodecAt = codec_of_rounds(settings, layout, "cpu")
        start, budget = self.arrays.to_adapter(arrays), broadcast_budget(settings, layout)
        for name, tensor in start.items():
            if not bool(tensor.isfinite().all()):
                raise CodecError(f"array {name!r} holds NaN, infinity or a value beyond float32: it cannot be coded")
        self.delivery = Delivery(codec_at, layout, start, run_id, budget, self.clients, start_is_known=False)
        self.codec_at = codec_at
        check_budgets(settings, codec_at(self.delivery.held))
        _LOG.info("codes both ways: %s", self.arrays.told())
        self.intake = Intake(codec_at(self.delivery.held), run_id, self.clients, byte_budget(settings, layout))
        self._used: dict[int, str] = {}  # digests of the payloads of this round

    @property
    def adapter(self) -> dict[str, Tensor]:
        return self.arrays.layout.to_update(self.delivery.held.adapter_RC)

    def begin_round(self, server_round: int, nodes: Iterable[int]) -> None:
        """What was decoded in a round that came to nothing was not used."""
        if server_round != self.server_round:
            self.server_round = server_round
            self._used.clear()
        self.clients.clear()  # both ends look at this set: who left misses nothing
        self.clients.update(nodes)

    def parcel(self, node: int) -> Parcel:
        claim = self.claims.pop(node, None)
        return self.delivery.outgoing(node) if claim is None else self.delivery.repair(node, claim)

    def follow(self, arrays: ArrayRecord) -> None:
        """A strategy that sends other arrays than a round came to has made a step of its own."""
        given, held = self.arrays.to_adapter(arrays), self.arrays.to_adapter(self.record())
        if any(not torch.equal(given[name], tensor) for name, tensor in held.items()):
            self.settle(arrays)
        self.exact = self.arrays.exact_of(arrays)

    def read(self, content: RecordDict, node: int) -> RecordDict:
        """Raises CodecError: there is no payload, or it is not this node's of this round."""
        key = self.arrays_key
        if PAYLOAD not in content.array_records.get(key, {}):
            raise CodecError(f"it holds no payload under {key!r}: {NO_MOD}")
        payload = from_one_array(content, key, PAYLOAD, PAYLOAD_TYPE)
        blocks_RC = self.intake.blocks_of(payload, node, self.server_round, self.codec_at(self.delivery.held))
        update = self.arrays.layout.to_update(blocks_RC)
        new = {name: tensor + update[name] for name, tensor in self.adapter.items()}
        if any(not bool(tensor.isfinite().all()) for tensor in new.values()):
            raise CodecError("it decodes to arrays beyond float32")
        record = self.arrays.to_record(new, content.array_records.get(EXACT, ArrayRecord()))
        if node in self._used:
            raise CodecError("it answers twice")
        self._used[node] = digest_of(payload)
        return RecordDict({**{name: one for name, one in content.items() if name != EXACT}, key: record})

    def settle(self, arrays: ArrayRecord) -> ArrayRecord:
        _, step = self.delivery.settle(self.arrays.to_adapter(arrays))
        self.intake.used(self._used, step)
        self.intake.side = self.delivery.held.side
        self._used.clear()
        self.exact = self.arrays.exact_of(arrays)
        return self.record()

    def record(self) -> ArrayRecord:
        """What all hold, as the app has it."""
        return self.arrays.to_record(self.adapter, self.exact)


def _check_same(message: Message, arrays: ArrayRecord) -> None:
    sent = message.content.array_records[_key_of(message.content)]
    if sent is not arrays and (
        sent.keys() != arrays.keys() or any(sent[name].data != array.data for name, array in arrays.items())
    ):
        raise CodecError(
            f"the strategy sends node {message.metadata.dst_node_id} other arrays than the global ones: only those can "
            "be coded"
        )


def _key_of(content: RecordDict) -> str:
    """Raises CodecError: there is not one record of the app's arrays."""
    keys = [str(key) for key in content.array_records if key != EXACT]
    if len(keys) != 1:
        raise CodecError(f"a message with {len(keys)} records of arrays: one can be coded")
    return keys[0]


def _size_of(content: RecordDict) -> int:
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
