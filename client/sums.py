"""A client's part in secure aggregation, between messages: its key pair and its memory of sums, on the node's disk.

Knows the protocol and files; no torch, so that what a server asks at the end of a round is answered at once.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from numpy.typing import NDArray

from conf.output import replace_file
from gradcodec.residues import pack_residues, unpack_residues
from privacy.errors import PrivacyError
from privacy.secagg import Invitation, KeyPair, Ledger, Party, Request


class Member:
    """One partition in one run."""

    def __init__(self, folder: Path, run_id: str, partition: int, peer_keys: Path | None = None) -> None:
        """
        Args:
            folder: of the run, in the node's memory; made when something is kept.
            run_id: of the run.
            partition: of the client.
            peer_keys: a folder with the public keys of all nodes, ``node-<partition>.pub``, that did not come from the
                server; the others' keys for sums must then be signed by them. None: the server's word is taken.
        """
        self._run_id = run_id
        self._partition = partition
        self._peer_keys = peer_keys
        self._key, self._ledger = folder / f"sum-{partition}.key", folder / f"sum-{partition}.json"

    def publish(self, node_key: Path | None = None) -> bytes:
        """The public key of this run, signed where the node has a key of its own; a new one where there is none yet.

        Raises:
            PrivacyError: what is on the disk is damaged, or the node's key cannot be read.
        """
        if not self._key.is_file():
            self._ledger.unlink(missing_ok=True)
            self._write(self._key, KeyPair.fresh().secret)
        signing = None if node_key is None else _signing_key(node_key)
        return self._keys().publish(self._run_id, self._partition, signing).pack()

    def contribute(self, residues: bytes, invitation: Invitation, least_stay: int) -> bytes:
        """A client's integers, masked.

        Args:
            residues: as ``gradcodec.residues`` packs them, modulo the invitation's modulus.
            invitation: to the sum.
            least_stay: how many of the invited must stay to its end, by the run's settings.

        Raises:
            PrivacyError: it is not one that this client may follow, or the integers are not as invited.
        """
        if invitation.threshold < least_stay or (
            self._peer_keys is not None and 2 * invitation.threshold <= len(invitation.members)
        ):
            raise PrivacyError(
                f"invited to a sum that {invitation.threshold} of {len(invitation.members)} clients can open: by the "
                f"run's settings it takes {least_stay}, and more than half where the server is not trusted"
            )

        def pack(masked: NDArray[np.uint32]) -> bytes:
            return pack_residues(masked.astype(np.int64), invitation.modulus)

        values = unpack_residues(residues, invitation.modulus, invitation.length)
        return self._party().contribute(values, invitation, invitation.round, pack).pack(invitation)

    def answer(self, request: bytes) -> bytes:
        """What opens the sum. Raises PrivacyError: this client must not answer, or it did before."""
        asked = Request.unpack(request)
        return self._party().answer(asked).pack(asked)

    def _party(self) -> Party:
        state = self._ledger.read_bytes() if self._ledger.is_file() else b""
        ledger = Ledger(state, lambda content: self._write(self._ledger, content))
        trusted = None if self._peer_keys is None else _public_keys(self._peer_keys)
        return Party(self._run_id, self._partition, self._keys(), ledger, trusted)

    def _keys(self) -> KeyPair:
        try:
            return KeyPair(self._key.read_bytes())
        except OSError as error:
            raise PrivacyError(
                f"{self._key}: the key of this run is gone ({error.strerror}): the next roll call makes another"
            ) from None

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)

        def write(part: Path) -> None:
            part.unlink(missing_ok=True)
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)

        replace_file(path, write)


def _signing_key(path: Path) -> EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise PrivacyError(f"{path}: the node's key cannot be read: {error}") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise PrivacyError(f"{path}: it is no key of an elliptic curve, as `python -m server keys` makes them")
    return key


def _public_keys(folder: Path) -> dict[int, EllipticCurvePublicKey]:
    """Partition -> the key of its node. Raises PrivacyError: there are none, or one is none."""
    found = {}
    for path in sorted(folder.glob("node-*.pub")):
        partition = path.stem.removeprefix("node-")
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError) as error:
            raise PrivacyError(f"{path}: it cannot be read: {error}") from None
        if not partition.isdecimal() or not isinstance(key, EllipticCurvePublicKey):
            raise PrivacyError(f"{path}: node-<partition>.pub with a key of an elliptic curve is expected")
        found[int(partition)] = key
    if not found:
        raise PrivacyError(f"{folder}: it holds no node-<partition>.pub, by which the others' keys are checked")
    return found
