"""Messages out, replies in, one at a time as they come, until all are there or the deadline has passed.

Flower's own ``send_and_receive`` collects a round's replies in a list and looks for new ones every three seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS = 0.25


def replies_to(
    grid: Grid, messages: Iterable[Message], seconds: float, poll_seconds: float = POLL_SECONDS
) -> Iterator[Message]:
    """Sends the messages at once; then gives every reply, once. What comes after ``seconds`` is not asked for any
    more."""
    unanswered = set(filter(None, grid.push_messages(list(messages))))
    return _pulled(grid, unanswered, time.monotonic() + seconds, poll_seconds)


def _pulled(grid: Grid, unanswered: set[str], deadline: float, poll_seconds: float) -> Iterator[Message]:
    while unanswered:
        for reply in grid.pull_messages(list(unanswered)):
            if reply.metadata.reply_to_message_id in unanswered:
                unanswered.remove(reply.metadata.reply_to_message_id)
                yield reply
        if time.monotonic() >= deadline:
            return
        if unanswered:
            time.sleep(poll_seconds)
