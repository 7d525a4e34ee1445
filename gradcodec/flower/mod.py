"""``coded()``: what a client app needs so that it sends and gets codes. The app itself sees arrays, as without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict

from gradcodec.broadcast import Held
from gradcodec.client import ClientEnd, LacksError, Place
from gradcodec.errors import CodecError
from gradcodec.flower.arrays import AppArrays
from gradcodec.flower.codecs import codec_of_rounds
from gradcodec.flower.memory import ContextMemory
from gradcodec.flower.turn import CODING, EXACT, HOLDS, LACKS, Turn
from gradcodec.flower.wire import BUNDLE, BUNDLE_TYPE, PAYLOAD, PAYLOAD_TYPE, from_one_array, in_one_array

App = Callable[[Message, Context], Message]
DEFLATED_AT_MOST = 1040
"""Times: more than zlib can. What a bundle can hold bounds the memory that is taken for what it should hold."""


def coded(device: str = "cpu", artifact: str | None = None) -> Callable[[Message, Context, App], Message]:
    """A mod for ``ClientApp(mods=[coded()])``: the other end of the strategies ``Coded`` and ``CodedFedAvg``.

    A message that comes from another strategy goes through untouched, so that it does no harm in an app that is used
    with both. It belongs before mods that change what is sent, such as differential privacy: those see arrays.

    Args:
        device: where updates are coded, as PyTorch calls it.
        artifact: folder of the trained codec, where the server's is not the general one; both need the same.
    """

    def mod(message: Message, context: Context, app: App) -> Message:
        coding = message.content.config_records.get(CODING) if message.has_content() else None
        if coding is None:
            return app(message, context)
        turn = Turn.unpack(coding, artifact)
        client = _Client(turn, ContextMemory(context.state, turn.run_id), device)
        try:
            held = client.take_in(message.content)
        except LacksError as error:
            lacks = RecordDict({LACKS: ConfigRecord({HOLDS: error.holds} if error.holds else {})})
            return Message(lacks, reply_to=message)
        given = client.arrays.to_record(client.arrays.layout.to_update(held.adapter_RC), _exact(message.content))
        others = {key: one for key, one in message.content.items() if key not in (CODING, EXACT)}
        message.content = RecordDict({**others, turn.arrays_key: given})
        trains = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
        reply = app(message, context)
        client.memory.keep_in(context.state)
        if trains and reply.has_content() and reply.content.array_records:
            reply.content = client.encoded(reply.content, held, context.node_id)
        return reply

    return mod


class _Client:
    """One message's work."""

    def __init__(self, turn: Turn, memory: ContextMemory, device: str) -> None:
        self._turn = turn
        self.memory = memory
        self._device = device
        self._known = memory.arrays
        self._arrays = self._known if turn.arrays is None else turn.arrays

    @property
    def arrays(self) -> AppArrays:
        assert self._arrays is not None
        return self._arrays

    def take_in(self, content: RecordDict) -> Held:
        """What the client holds from now on. Raises LacksError: what it was sent does not lead there."""
        if self._arrays is None:
            raise LacksError("")
        turn, layout = self._turn, self._arrays.layout
        bundle = from_one_array(content, turn.arrays_key, BUNDLE, BUNDLE_TYPE)
        if self._known != self._arrays and DEFLATED_AT_MOST * len(bundle) < 4 * layout.rank * layout.num_columns:
            raise CodecError("the server names arrays that this client does not know, and does not send them")
        self._codec_at = codec_of_rounds(turn.settings, layout, self._device)
        self._end = ClientEnd(self._codec_at, layout, turn.settings, turn.run_id)
        nothing_RC = torch.zeros(layout.rank, layout.num_columns)
        held = self._end.take_in(turn.broadcast(bundle), self.memory, nothing_RC)
        if turn.arrays is not None:
            self.memory.arrays = turn.arrays
        return held

    def encoded(self, content: RecordDict, held: Held, client: int) -> RecordDict:
        """A reply with the payload in place of the app's arrays. Raises CodecError: they are not those that it was
        given, or not finite."""
        turn, arrays = self._turn, self.arrays
        if len(content.array_records) != 1:
            names = ", ".join(map(str, content.array_records))
            raise CodecError(f"the app's reply has several records of arrays, {names}: one can be coded")
        ((key, record),) = content.array_records.items()
        new = arrays.to_adapter(record)
        old = arrays.layout.to_update(held.adapter_RC)
        update = {name: (tensor - old[name]).to(self._device) for name, tensor in new.items()}
        place = Place(client, turn.server_round, held.side, turn.accepted)
        payload = self._end.encode(update, self.memory, place, self._codec_at(held))
        exact = arrays.exact_of(record)
        beside = {EXACT: exact} if exact else {}
        return RecordDict({**content, key: in_one_array(PAYLOAD, PAYLOAD_TYPE, payload), **beside})


def _exact(content: RecordDict) -> ArrayRecord:
    return content.array_records.get(EXACT, ArrayRecord())
