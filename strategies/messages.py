"""Messages out, replies in, one at a time as they come, until all are there or the deadline has passed.

Flower's own ``send_and_receive`` collects a round's replies in a list and looks for new ones every three seconds. It
also inflates all that are there at once, and lets one that no one can read end the run and take the others with it; so
every reply is asked for on its own here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from logging import WARNING

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from google.protobuf.message import DecodeError

POLL_SECONDS = 0.25
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


def replies_to(
    grid: Grid, messages: Iterable[Message], seconds: float, poll_seconds: float = POLL_SECONDS
) -> Iterator[Message]:
    """Sends the messages at once; then gives every reply, once. What comes after ``seconds`` is not asked for any
    more."""
    sent = list(messages)
    unanswered = {identity: message for identity, message in zip(_push(grid, sent), sent, strict=True) if identity}
    return _pulled(grid, unanswered, time.monotonic() + seconds, poll_seconds)


def _push(grid: Grid, messages: list[Message]) -> list[str]:
    """The identities of the messages, once all that they hold is stored.

    A SuperLink that dies between storing an object and saying so does not know the object any more when it is sent
    again, and says that it was not stored. The same messages have the same identities: a second push takes up what is
    missing, and sends nothing twice.
    """
    for left in reversed(range(PUSH_TRIES)):
        try:
            return list(grid.push_messages(messages))
        except ObjectPushError as error:
            if not left:
                raise
            log(WARNING, "%s The messages are sent again", error)
    raise AssertionError


def _pulled(grid: Grid, unanswered: dict[str, Message], deadline: float, poll_seconds: float) -> Iterator[Message]:
    while unanswered:
        for identity, message in list(unanswered.items()):
            for reply in _reply_to(grid, identity, message):
                if unanswered.pop(identity, None) is not None:
                    yield reply
        if time.monotonic() >= deadline:
            return
        if unanswered:
            time.sleep(poll_seconds)


def _reply_to(grid: Grid, identity: str, message: Message) -> list[Message]:
    """The reply, if it is there; an error in its place if it is nothing that can be read."""
    try:
        return [r for r in grid.pull_messages([identity]) if r.metadata.reply_to_message_id == identity]
    except UNREADABLE as error:
        return [Message(Error(ErrorCode.UNKNOWN, f"its reply cannot be read: {error!r}"), reply_to=message)]
