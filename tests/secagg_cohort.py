"""A round's clients and server in one process, for the tests of secure aggregation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from numpy.typing import NDArray

from privacy.secagg import Contribution, Invitation, KeyPair, Ledger, Opening, Party, Request, threshold_of

RUN = "run-7"


def pack(values: NDArray[np.uint32]) -> bytes:
    return values.astype("<u4").tobytes()


def unpack(masked: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(masked, "<u4").astype(np.uint32)


@dataclass
class Cohort:
    """``clients`` with keys, at partitions 0, 3, 6 ..., so that no position passes for a partition."""

    clients: int
    threshold: int = 0
    modulus: int = 1000
    length: int = 20
    trusted: Mapping[int, EllipticCurvePublicKey] | None = None
    keys: dict[int, KeyPair] = field(default_factory=dict)
    states: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.threshold = self.threshold or threshold_of(self.clients)
        self.partitions = tuple(range(0, 3 * self.clients, 3))
        for partition in self.partitions:
            self.keys[partition] = KeyPair.fresh()

    def invite(self, number: int = 1, among: Sequence[int] | None = None, **changed: object) -> Invitation:
        members = tuple(self.keys[partition].publish(RUN, partition) for partition in among or self.partitions)
        settings = {"threshold": self.threshold, "modulus": self.modulus, "length": self.length, **changed}
        return Invitation(RUN, number, members, **settings)  # type: ignore[arg-type]

    def party(self, partition: int) -> Party:
        """As a fresh process has it: from the secret key and what the ledger stored."""

        def store(state: bytes) -> None:
            self.states[partition] = state

        ledger = Ledger(self.states.get(partition, b""), store)
        return Party(RUN, partition, KeyPair(self.keys[partition].secret), ledger, self.trusted)

    def message(self, partition: int) -> NDArray[np.int64]:
        return np.random.default_rng(partition).integers(0, self.modulus, self.length)

    def contribute(self, partition: int, invitation: Invitation) -> bytes:
        party = self.party(partition)
        values = self.message(partition)
        return party.contribute(values, invitation, invitation.round, pack).pack(invitation)

    def opening(self, invitation: Invitation, present: Sequence[int]) -> Opening:
        """With the messages of those present, closed."""
        opening = Opening(invitation)
        for partition in present:
            add(opening, partition, self.contribute(partition, invitation))
        opening.close()
        return opening

    def answer(self, partition: int, request: Request) -> bytes:
        request = Request.unpack(request.pack())
        return self.party(partition).answer(request).pack(request)

    def expected(self, summed: Sequence[int]) -> NDArray[np.uint32]:
        total = sum((self.message(partition) for partition in summed), np.zeros(self.length, dtype=np.int64))
        return (total % self.modulus).astype(np.uint32)


def add(opening: Opening, partition: int, data: bytes) -> None:
    """As a server takes a reply."""
    contribution = Contribution.unpack(data, opening.invitation)
    opening.add(partition, contribution, unpack(contribution.masked))
