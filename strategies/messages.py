"""Messages out, replies in, one at a time as they come, until all are there or the deadline has passed.

Flower's own ``send_and_receive`` collects a round's replies in a list and looks for new ones every three seconds. It
also inflates all that are there at once, and lets one that no one can read end the run and take the others with it; so
every reply is asked for on its own here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import WARNING

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from google.protobuf.message import DecodeError

from strategies.folding import fold, unfold

SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 3.0
"""Seconds between two looks for replies, each of which asks for every reply that is missing. A simulation answers at
once; a SuperLink takes a good part of a second of a core, so that looks take a tenth of the time at most."""
PUSH_TRIES = 3
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    DecodeError,
)
"""What Flower raises while it inflates objects that a node made up. A connection's errors are none of these."""


class Mailbox:
    """Messages that were sent, and their replies as they come, each once."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.unanswered: dict[str, Message] = {}  # Flower's identity of a message -> the message
        self.asking_seconds = 0.0  # that the last look took, without what was done with the replies

    def send(self, messages: Iterable[Message]) -> None:
        sent = list(messages)
        for message in sent:
            message.content = fold(message.content)
        identities = _push(self.grid, sent)
        self.unanswered |= {identity: message for identity, message in zip(identities, sent, strict=True) if identity}

    def arrived(self) -> Iterator[Message]:
        """The replies that are there now; what nobody can read is an error reply."""
        self.asking_seconds = 0.0
        for identity, message in list(self.unanswered.items()):
            began = time.monotonic()
            replies = _reply_to(self.grid, identity, message)
            self.asking_seconds += time.monotonic() - began
            for reply in replies:
                if self.unanswered.pop(identity, None) is not None:
                    yield reply


Again = Callable[[Message], Message | None]
"""A reply -> what is asked in its place; None: the reply is an answer."""


def replies_to(
    grid: Grid, messages: Iterable[Message], seconds: float, again: Again | None = None
) -> Iterator[Message]:
    """Sends the messages at once; then gives every reply, once, and asks ``again`` where that says so. What comes after
    ``seconds`` is not asked for any more."""
    mailbox = Mailbox(grid)
    mailbox.send(messages)
    return _pulled(mailbox, time.monotonic(), seconds, again)


def in_order(
    partitions: Sequence[int], partition_of: Callable[[Message], int | None], replies: Iterable[Message]
) -> Iterator[tuple[int, Message | None]]:
    """Replies by ascending partition, each as soon as all before it are there; only those that come early are kept.

    Args:
        partitions: those that were asked, ascending.
        partition_of: a reply -> who was asked for it; None: nobody.
        replies: in any order. What nobody was asked for, or was answered before, is left out.

    Yields:
        Every partition that was asked, once, and its reply; None if there was none.
    """
    waiting = list(partitions)
    early: dict[int, Message] = {}
    for reply in replies:
        partition = partition_of(reply)
        if partition is None or partition not in waiting or partition in early:
            log(WARNING, "a reply that nobody asked for is left out")
            continue
        early[partition] = reply
        while waiting and waiting[0] in early:
            first = waiting.pop(0)
            yield first, early.pop(first)
    for partition in waiting:
        yield partition, early.pop(partition, None)


def _push(grid: Grid, messages: list[Message]) -> list[str]:
    """The identities of the messages, once all that they hold is stored.

    A SuperLink that dies between storing an object and saying so does not know the object any more when it is sent
    again, and says that it was not stored. The same messages have the same identities: a second push takes up what is
    missing, and sends nothing twice.
    """
    for tries_after_this in reversed(range(PUSH_TRIES)):
        try:
            return list(grid.push_messages(messages))
        except ObjectPushError as error:
            if not tries_after_this:
                raise
            log(WARNING, "%s The messages are sent again", error)
    raise AssertionError


def _pulled(mailbox: Mailbox, sent: float, seconds: float, again: Again | None) -> Iterator[Message]:
    while mailbox.unanswered:
        for reply in mailbox.arrived():
            message = again(reply) if again is not None else None
            if message is None:
                yield reply
            else:
                mailbox.send([message])
        if (elapsed := time.monotonic() - sent) >= seconds:
            return
        if mailbox.unanswered:
            pause = min(max(9 * mailbox.asking_seconds, SHORTEST_PAUSE), LONGEST_PAUSE)
            time.sleep(min(pause, seconds - elapsed))


def _reply_to(grid: Grid, identity: str, message: Message) -> list[Message]:
    """The reply, if it is there; an error in its place if it is nothing that can be read."""
    try:
        replies = [r for r in grid.pull_messages([identity]) if r.metadata.reply_to_message_id == identity]
        for reply in replies:
            if reply.has_content():
                reply.content = unfold(reply.content)
        return replies
    except UNREADABLE as error:
        return [Message(Error(ErrorCode.UNKNOWN, f"its reply cannot be read: {error!r}"), reply_to=message)]
