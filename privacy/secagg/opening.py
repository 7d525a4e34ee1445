"""The server's side of a sum: it adds masked messages up, and takes the masks off with what clients answer. Knows
integers and messages; keeps the sum, and of single messages only seeds' checks and sealed shares.

What a client sends is judged when it is taken: PrivacyError says who and what, and leaves everything as it was, so that
this client counts as gone. Memory: 8 bytes for each of the sum's integers, and 16 n^3 bytes of sealed shares.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PrivacyError
from privacy.secagg.invitation import Invitation
from privacy.secagg.limits import fewest_summed
from privacy.secagg.masks import add_mask, check_of, residues, sign_of
from privacy.secagg.messages import Answer, Contribution, Request
from privacy.secagg.shares import combine

MAX_TRIES = 64
"""Sets of shares that are tried for one seed, where some of them are wrong."""


class LostSumError(PrivacyError):
    """A sum that cannot be opened. ``suspects`` are the partitions that may have caused it."""

    def __init__(self, message: str, suspects: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.suspects = suspects


class Opening:
    """One attempt at a sum: ``add`` messages, make a ``request`` for each client, ``take`` answers, read the ``total``.

    Args:
        invitation: the one that all clients got.
    """

    def __init__(self, invitation: Invitation) -> None:
        self.invitation = invitation
        self._masked = np.zeros(invitation.length, dtype=np.int64)
        self._contributions: dict[int, Contribution] = {}
        self._answers: dict[int, Answer] = {}
        self._summed: tuple[int, ...] | None = None
        self._good_set: tuple[int, ...] = ()
        self.misfits: set[tuple[int, int]] = set()
        """(who answered, who dealt) of shares that did not fit: one of the two, nobody knows which, is wrong."""

    def add(self, partition: int, contribution: Contribution, values: NDArray[Any]) -> None:
        """Adds a message.

        Args:
            partition: whose.
            contribution: as unpacked.
            values: [length] integers, what ``contribution.masked`` holds.

        Raises:
            PrivacyError: it was not invited, is there already, comes too late, or does not fit.
        """
        self.invitation.position(partition)
        if self._summed is not None:
            raise PrivacyError(f"partition {partition}: its masked message came after the sum was closed")
        if partition in self._contributions:
            raise PrivacyError(f"partition {partition}: a second masked message for the same sum")
        self._masked += residues(values, self.invitation, f"partition {partition}'s masked message")
        self._contributions[partition] = Contribution(contribution.checks, contribution.sealed, b"")

    @property
    def summed(self) -> tuple[int, ...]:
        """Partitions whose messages are in the sum, ascending."""
        return tuple(sorted(self._contributions))

    def close(self) -> tuple[int, ...]:
        """Takes no more messages. Returns the partitions to send a ``request`` to.

        Raises:
            LostSumError: too few came.
        """
        least = fewest_summed(self.invitation.threshold)
        if len(self._contributions) < least:
            raise LostSumError(
                f"{len(self._contributions)} masked messages came; a sum takes {least}: it is not opened"
            )
        self._summed = self.summed
        return self._summed

    def request(self, partition: int) -> Request:
        """What to ask a client of the closed sum."""
        summed = self._closed()
        assert partition in summed
        place = self.invitation.position(partition)
        sealed = tuple(self._contributions[dealer].sealed[place] for dealer in summed)
        return Request(self.invitation, summed, sealed)

    def take(self, partition: int, answer: bytes) -> None:
        """Takes a client's answer, as it came. Raises PrivacyError: it does not fit, or is its second."""
        summed = self._closed()
        if partition not in summed:
            raise PrivacyError(f"partition {partition}: an answer to a sum that it is not in")
        if partition in self._answers:
            raise PrivacyError(f"partition {partition}: a second answer for the same sum")
        try:
            self._answers[partition] = Answer.unpack(answer, self.invitation, summed)
        except PrivacyError as error:
            raise PrivacyError(f"partition {partition}: {error}") from None

    @property
    def can_open(self) -> bool:
        """Whether as many answered as must."""
        return len(self._answers) >= self.invitation.threshold

    def total(self) -> NDArray[np.uint32]:
        """The sum of the messages of ``summed`` modulo the modulus, [length], exactly.

        Raises:
            LostSumError: too few answered, or some shares are wrong and the others too few.
        """
        summed, partitions = self._closed(), self.invitation.partitions
        if not self.can_open:
            raise LostSumError(
                f"{len(self._answers)} of {len(summed)} clients answered; it takes {self.invitation.threshold}: "
                "the sum stays masked"
            )
        dropped = [place for place, partition in enumerate(partitions) if partition not in summed]
        opened = self._masked.copy()
        for dealer in summed:
            own = partitions.index(dealer)
            for number, place in enumerate((own, *dropped)):
                seed = self._seed(dealer, number, self._contributions[dealer].checks[place])
                add_mask(opened, seed, -sign_of(own, place), self.invitation)
        return (opened % self.invitation.modulus).astype(np.uint32)

    def _closed(self) -> tuple[int, ...]:
        assert self._summed is not None, "close() comes first"
        return self._summed

    def _seed(self, dealer: int, number: int, check: bytes) -> bytes:
        """A dealer's seed from the shares of those who answered."""
        shares = {
            self.invitation.position(holder) + 1: answer.shares[dealer][number]
            for holder, answer in self._answers.items()
            if dealer in answer.shares
        }
        for tries, chosen in enumerate(self._sets(tuple(sorted(shares)))):
            seed = combine({holder: shares[holder] for holder in chosen})
            if check_of(seed, self.invitation.digest) == check:
                if tries:
                    self._note_misfits(dealer, shares, chosen, seed)
                self._good_set = chosen
                return seed
        raise LostSumError(
            f"the shares that partition {dealer} dealt do not give its seed ({len(shares)} came, it takes "
            f"{self.invitation.threshold}): it dealt wrong ones, or too many answered wrong ones; the sum is lost",
            (dealer,),
        )

    def _sets(self, holders: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """Sets of holders to try: the one that was right before, then such that each single one is left out soon."""
        size = self.invitation.threshold
        if set(self._good_set) <= set(holders) and self._good_set:
            yield self._good_set
        if len(holders) < size:
            return
        for start in range(len(holders)):
            yield tuple(sorted((holders + holders)[start : start + size]))
        if len(holders) > size:
            chooser = random.Random(0)  # its choice is no secret
            for _ in range(MAX_TRIES - len(holders)):
                yield tuple(sorted(chooser.sample(holders, size)))

    def _note_misfits(self, dealer: int, shares: dict[int, bytes], chosen: tuple[int, ...], seed: bytes) -> None:
        """A right share may take the place of any other."""
        for holder in shares.keys() - set(chosen):
            others = {other: shares[other] for other in (*chosen[1:], holder)}
            if combine(others) != seed:
                self.misfits.add((self.invitation.partitions[holder - 1], dealer))
