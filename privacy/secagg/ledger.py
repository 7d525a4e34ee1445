"""What a client remembers of the sums that it took part in, so that it does not give itself away by being asked again.
Knows invitations; where the bytes are kept is its user's business.

The rules, for one key pair:

- Rounds go forward. An earlier one is not taken up again.
- A client masks once in a context, and a nonce counts once in a round.
- A further attempt of a round asks some of the same clients, and no fewer of them must stay. So two attempts of a round
  cannot both be opened: that takes two majorities of the first one's clients, and
- a client answers once in a round, whatever the attempt.

Were two sums of the same messages opened, of sets that differ by one client, their difference would be its message.
Across rounds nothing of that kind can be held: messages differ, but not by much. That is what noise is for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from privacy.errors import PrivacyError
from privacy.secagg.invitation import Invitation

MAX_ATTEMPTS = 16
"""Of one round; more are no retry, and would let the record grow."""


@dataclass
class _Record:
    round: int = -1
    partitions: list[int] = field(default_factory=list)  # of the last attempt
    threshold: int = 0  # likewise
    attempts: dict[str, str] = field(default_factory=dict)  # nonce -> context, in hexadecimal
    is_answered: bool = False


class Ledger:
    """A client's memory, for one key pair.

    Args:
        state: what ``store`` was given last; empty for a new key pair.
        store: keeps the bytes. It is called before anything is said to the server, and must have them on disk when it
            returns: a client that forgot what it answered would answer again.

    Raises:
        PrivacyError: the state is damaged. Then this key pair can no longer be used.
    """

    def __init__(self, state: bytes = b"", store: Callable[[bytes], None] = lambda _: None) -> None:
        self._store = store
        self._record = _read(state) if state else _Record()

    def enter(self, invitation: Invitation) -> None:
        """Notes that the client masks a message for this invitation. Raises PrivacyError: it must not."""
        record = self._record
        if invitation.round < record.round:
            raise PrivacyError(f"invited to round {invitation.round}, after one to round {record.round}: it is over")
        if invitation.round > record.round:
            record = _Record(invitation.round)
        else:
            _check_retry(record, invitation)
        attempts = {**record.attempts, invitation.nonce.hex(): invitation.digest.hex()}
        self._keep(_Record(invitation.round, list(invitation.partitions), invitation.threshold, attempts))

    def answer(self, invitation: Invitation) -> None:
        """Notes that the client helps to open this invitation's sum. Raises PrivacyError: it must not."""
        record = self._record
        context = record.attempts.get(invitation.nonce.hex())
        if invitation.round != record.round or context != invitation.digest.hex():
            raise PrivacyError(f"asked to open a sum of round {invitation.round} in which this client masked nothing")
        if record.is_answered:
            raise PrivacyError(
                f"asked again to open a sum of round {invitation.round}: a client answers once in a round"
            )
        self._keep(_Record(**{**asdict(record), "is_answered": True}))

    def _keep(self, record: _Record) -> None:
        self._store(json.dumps(asdict(record)).encode())
        self._record = record


def _check_retry(record: _Record, invitation: Invitation) -> None:
    if record.is_answered:
        raise PrivacyError(f"invited again to round {invitation.round}, whose sum this client helped to open already")
    if invitation.nonce.hex() in record.attempts:
        raise PrivacyError(f"invited again to round {invitation.round} with a nonce that was used: draw a new one")
    if not set(invitation.partitions) <= set(record.partitions) or invitation.threshold < record.threshold:
        raise PrivacyError(
            f"invited again to round {invitation.round} with other clients or a lower threshold: a further attempt "
            "asks some of the same clients, with the same threshold or a higher one"
        )
    if len(record.attempts) >= MAX_ATTEMPTS:
        raise PrivacyError(
            f"invited to round {invitation.round} more than {MAX_ATTEMPTS} times: go on to the next round"
        )


def _read(state: bytes) -> _Record:
    try:
        found: dict[str, Any] = json.loads(state)
        record = _Record(**found)
    except (ValueError, TypeError):
        record = None
    if record is None or [type(value) for value in asdict(record).values()] != [int, list, int, dict, bool]:
        raise PrivacyError(
            "the record of the sums that this client took part in is damaged: remove it together with the secret key; "
            "the next roll call makes both anew"
        )
    return record
