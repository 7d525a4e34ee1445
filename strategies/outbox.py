"""The messages of a round, or of an evaluation: who was sent which, and what is sent to one who cannot take his in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, Message, RecordDict

from strategies.broadcast import Broadcaster
from strategies.folding import unfold
from strategies.outcomes import Downlink
from strategies.receive import lacks_of
from strategies.wire import ARRAYS, CONFIG


class Outbox:
    """Of messages that bring the adapter, one a partition."""

    def __init__(self, messages: Iterable[Message], nodes: Mapping[int, int], broadcaster: Broadcaster) -> None:
        """
        Args:
            messages: which are sent, or will be.
            nodes: partition -> node, of all that they go to.
            broadcaster: what made the adapter in them.
        """
        self.messages = list(messages)
        self._partitions = {node: partition for partition, node in nodes.items()}
        self._broadcaster = broadcaster
        self._asked: dict[str, int] = {}  # identity of each message -> its partition
        self._repaired: set[int] = set()  # partitions that were sent another message

    def partition_of(self, reply: Message) -> int | None:
        """Who was asked for what this answers; None: nobody."""
        identity = reply.metadata.reply_to_message_id
        if identity not in self._asked:  # messages get their identity when they are sent
            self._asked = {m.metadata.message_id: self._partitions[m.metadata.dst_node_id] for m in self.messages}
        return self._asked.get(identity)

    def repair(self, reply: Message) -> tuple[Message, Downlink] | None:
        """What a client is sent that could not take in what it was sent, once each. None: the reply is an answer."""
        lacks, partition = lacks_of(reply), self.partition_of(reply)
        if lacks is None or partition is None or partition in self._repaired:
            return None
        found = self._broadcaster.repair(partition, lacks)
        if found is None:
            return None
        self._repaired.add(partition)
        adapter, of_adapter, sent = found
        (asked,) = (m for m in self.messages if m.metadata.message_id == reply.metadata.reply_to_message_id)
        before = unfold(asked.content)
        config = ConfigRecord({**before.config_records[CONFIG], **of_adapter})
        content = RecordDict({**before, ARRAYS: adapter, CONFIG: config})
        message = Message(content, asked.metadata.dst_node_id, asked.metadata.message_type)
        self.messages.append(message)
        return message, sent
