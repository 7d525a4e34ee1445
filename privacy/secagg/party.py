"""The client's side of a sum: it masks a message, and later helps to take the masks off the sum. Knows keys, integers
and the client's memory; nothing of it stays between the two but the secret key and the ledger.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from numpy.typing import NDArray

from privacy.errors import PrivacyError
from privacy.secagg.invitation import Invitation
from privacy.secagg.keys import SEED_BYTES, Channel, KeyPair
from privacy.secagg.ledger import Ledger
from privacy.secagg.limits import fewest_summed
from privacy.secagg.masks import add_mask, check_of, residues, sign_of
from privacy.secagg.messages import Answer, Contribution, Request
from privacy.secagg.shares import SHARE_BYTES, split


class Party:
    """A client in a run.

    Args:
        run: the run's id, as the client knows it.
        partition: the client's own.
        keys: those that it published.
        ledger: its memory for these keys.
        trusted: the node key of every partition, from a source that is not the server. With it every member's key must
            be signed by its node; None takes the server's word for whose keys they are.
    """

    def __init__(
        self,
        run: str,
        partition: int,
        keys: KeyPair,
        ledger: Ledger,
        trusted: Mapping[int, EllipticCurvePublicKey] | None = None,
    ) -> None:
        self._run, self._partition, self._keys, self._ledger, self._trusted = run, partition, keys, ledger, trusted

    def contribute(
        self,
        values: NDArray[Any],
        invitation: Invitation,
        round_number: int,
        pack: Callable[[NDArray[np.uint32]], bytes],
    ) -> Contribution:
        """Masks a message.

        Args:
            values: [length] integers of any type, from 0 to the modulus - 1.
            invitation: as it came.
            round_number: the round that the message belongs to, as the client knows it.
            pack: masked integers [length], uint32, as random as can be -> bytes.

        Raises:
            PrivacyError: the invitation is not one that this client may follow, or the values are not as invited. Then
                nothing was noted.
        """
        position = self._check(invitation)
        if invitation.round != round_number:
            raise PrivacyError(f"invited to a sum of round {invitation.round} in round {round_number}")
        total = residues(values, invitation, "the message to mask")
        channels = self._channels(invitation)
        seeds = [channel.seed for channel in channels]
        seeds[position] = os.urandom(SEED_BYTES)
        self._ledger.enter(invitation)
        for place, seed in enumerate(seeds):
            add_mask(total, seed, sign_of(position, place), invitation)
        total %= invitation.modulus
        dealt = [split(seed, invitation.threshold, len(seeds)) for seed in seeds]
        sealed = tuple(
            channel.seal(b"".join(shares[place] for shares in dealt), self._partition, member.partition)
            for place, (channel, member) in enumerate(zip(channels, invitation.members, strict=True))
        )
        checks = tuple(check_of(seed, invitation.digest) for seed in seeds)
        return Contribution(checks, sealed, pack(total.astype(np.uint32)))

    def answer(self, request: Request) -> Answer:
        """Gives the shares that open the sum. Those of a client whose sealed shares are damaged are left out.

        Raises:
            PrivacyError: the client must not answer, or answered before.
        """
        invitation = request.invitation
        self._check(invitation)
        summed, partitions = request.summed, invitation.partitions
        if self._partition not in summed:
            raise PrivacyError("asked to open a sum that is said to lack this client's message")
        if len(summed) < fewest_summed(invitation.threshold):
            raise PrivacyError(
                f"asked to open a sum of {len(summed)} messages: it takes {fewest_summed(invitation.threshold)}"
            )
        channels = self._channels(invitation)
        self._ledger.answer(invitation)
        dropped = [place for place, partition in enumerate(partitions) if partition not in summed]
        found = {}
        for dealer, sealed in zip(summed, request.sealed, strict=True):
            place = partitions.index(dealer)
            text = channels[place].open(sealed, dealer, self._partition)
            if text is not None and len(text) == SHARE_BYTES * len(partitions):
                shares = [text[start : start + SHARE_BYTES] for start in range(0, len(text), SHARE_BYTES)]
                found[dealer] = tuple(shares[wanted] for wanted in (place, *dropped))
        return Answer(found)

    def _check(self, invitation: Invitation) -> int:
        """This client's position in an invitation that it may follow."""
        if invitation.run != self._run:
            raise PrivacyError(f"invited to run {invitation.run!r}, in run {self._run!r}")
        position = invitation.position(self._partition)
        if invitation.members[position].public_key != self._keys.public:
            raise PrivacyError("the invitation has another public key for this client than the one that it published")
        if self._trusted is not None:
            for member in invitation.members:
                node_key = self._trusted.get(member.partition)
                if node_key is None:
                    raise PrivacyError(f"partition {member.partition} has no trusted node key")
                if not member.is_signed_by(node_key, self._run):
                    raise PrivacyError(f"the public key of partition {member.partition} is not signed by its node")
        return position

    def _channels(self, invitation: Invitation) -> list[Channel]:
        return [self._keys.channel(member.public_key, invitation.digest) for member in invitation.members]
