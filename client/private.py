"""A client's own part of a run's privacy: how much noise goes into what it sends, and whether it may send at all.

The count of what was sent lies on the node's disk and is written before anything is: whatever a server asks for, a node
releases no more than the run's budget allows. Beside the count stands what it means, for the node's owner.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.private import Protection
from adapters.settings import num_steps, sampling_rate, trains_vectors
from client.residuals import COUNTS
from conf.output import write_json, write_text
from conf.schema import Settings
from conf.sums import noise_deviation
from gradcodec.linear import Terms
from gradcodec.residues import Integers
from privacy.accounting import Release
from privacy.budget import allowed_releases, deviation, release_of, spent_epsilon
from privacy.discrete import discrete_gaussians
from privacy.errors import BudgetSpentError, PrivacyError
from privacy.ledger import Ledger
from privacy.mechanism import Normals, clipped, noised
from privacy.normal import normals
from privacy.stream import Stream

_WINDOWS, _NOISE = b"windows", b"noise"
MAX_DELTA = 1e-5
"""What a node whose owner bounds epsilon takes: with a large delta any epsilon is kept."""


def keep_terms(settings: Settings, folder: Path, partition: int) -> None:
    """The terms on which a client first answered in a run that protects its data hold for all of the run: settings come
    with every message, and a server could change them.

    Args:
        settings: of this message.
        folder: of the run in the node's memory.
        partition: of the client.

    Raises:
        PrivacyError: they are others than those of an earlier message.
    """
    path = folder / f"{COUNTS}terms-{partition}.txt"
    if not settings.privacy.protects and not path.is_file():
        return
    terms: list[Any] = [dataclasses.asdict(settings.privacy), dataclasses.asdict(settings.train)]
    if settings.privacy.noise == "sum":
        terms.append(settings.federation.min_replies)
    digest = hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()
    with _alone(path):
        if not path.is_file():
            write_text(digest, path)
        elif path.read_text(encoding="utf-8") != digest:
            raise PrivacyError(
                f"run {settings.run_id} asks partition {partition} for an answer on other terms of privacy or training "
                "than before: a run keeps those that it began with"
            )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time works on what is counted in this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Owner:
    """What a node's owner allows of its data over all runs: their epsilons add up (Dwork and Roth 2014,
    theorem 3.16), and so do their deltas, of which each is bounded."""

    def __init__(self, memory: Path, max_epsilon: float | None) -> None:
        """
        Args:
            memory: the node's, of all runs and partitions: a run counts once, as the partitions of one share no data,
                and their numbers say nothing of whose data they are in another.
            max_epsilon: None: the owner sets no bound, and nothing is kept.
        """
        self.max_epsilon = max_epsilon
        self._path = memory / "spent.json"

    def check(self, settings: Settings) -> None:
        """Raises PrivacyError: the owner does not allow for this run."""
        if self.max_epsilon is None:
            return
        privacy = settings.privacy
        if not privacy.is_private or privacy.epsilon is None or privacy.noise_seed is not None:
            what = f"privacy.name={privacy.name}, privacy.epsilon={privacy.epsilon}, no noise that can be repeated"
            raise PrivacyError(f"this node takes part in runs with a privacy budget alone (--max-epsilon), not {what}")
        if privacy.delta > MAX_DELTA:
            raise PrivacyError(f"this node's owner takes a delta of {MAX_DELTA:g} at most, not {privacy.delta:g}")
        if privacy.noise == "sum":
            raise PrivacyError(
                "this node's owner bounds what the server itself learns (--max-epsilon), and privacy.noise=sum does not"
            )
        others = sum(spent for run, spent in self._spent().items() if run != settings.run_id)
        if others + privacy.epsilon > self.max_epsilon:
            raise PrivacyError(
                f"this run wants an epsilon of {privacy.epsilon:g}, and of the {self.max_epsilon:g} that this node's "
                f"owner allows for all runs (--max-epsilon) {others:g} are spent"
            )

    def enter(self, settings: Settings) -> None:
        """Counts a run's whole budget, once, before it releases anything."""
        if self.max_epsilon is None:
            return
        with _alone(self._path):
            self.check(settings)
            spent = self._spent()
            if settings.run_id not in spent:
                assert settings.privacy.epsilon is not None
                write_json({**spent, settings.run_id: settings.privacy.epsilon}, self._path)

    def _spent(self) -> dict[str, float]:
        """Run -> its epsilon."""
        if not self._path.is_file():
            return {}
        try:
            return {str(run): float(spent) for run, spent in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise PrivacyError(f"{self._path}: nobody knows what earlier runs have spent: {error}") from None


class Guard:
    """Of one partition in one run."""

    def __init__(self, settings: Settings, num_windows: int, folder: Path, partition: int) -> None:
        """
        Args:
            settings: as the server settled them.
            num_windows: that this client trains on.
            folder: of this run in the node's memory.
            partition: of the client.

        Raises:
            PrivacyError: no noise is enough, or nobody knows what was released before.
        """
        self.settings = settings.privacy
        self.partition = partition
        self._least_replies = settings.federation.min_replies
        # a layer that runs twice, is compiled, or has parameters that are no linear layer's
        model = settings.model
        self._one_by_one = model.gradient_checkpointing or model.compile or trains_vectors(settings.lora)
        rate = sampling_rate(settings.train, num_windows)
        self.release: Release = release_of(self.settings, rate, num_steps(settings.train, num_windows))
        self._path = folder / f"{COUNTS}{partition}.json"
        self._last = ""  # which message was counted last
        self.ledger = Ledger(allowed_releases(self.settings, self.release), self._write)
        self._load()

    def spend(self, server_round: int, secret: bytes) -> None:
        """Counts an answer, for good, and the same one once: its noise comes from its secret, so that an answer that is
        made again is the one before.

        Raises:
            BudgetSpentError: no more is allowed.
        """
        message = hashlib.sha256(secret + b"message").hexdigest()
        with _alone(self._path):
            self._load()  # another process may have counted
            if message != self._last:
                self._count(server_round, message)

    def _count(self, server_round: int, message: str) -> None:
        if self.ledger.is_spent(self.partition):
            raise BudgetSpentError(
                f"the privacy budget of partition {self.partition} in this run is spent: it has answered "
                f"{self.ledger.most} times"
            )
        self._last = message
        self.ledger.spend(server_round, [self.partition], 1, 1)

    def protection(self, secret: bytes) -> Protection:
        """DP-SGD's bound and noise, from randomness of this message alone (``record_dp``)."""
        drawn = Stream(_key(secret, _WINDOWS))
        return Protection(
            self.settings.clip,
            self.release.noise_multiplier,
            lambda count: torch.from_numpy(drawn.uniforms(count)),
            _normals(secret),
            self._one_by_one,
        )

    def hidden(self, update: Mapping[str, Tensor], secret: bytes) -> dict[str, Tensor]:
        """The update, clipped and noised (``client_dp``). Raises PrivacyError: it is not finite."""
        noise = deviation(self.settings, self._least_replies)
        return noised(clipped(update, self.settings.clip), noise, _normals(secret))

    def _load(self) -> None:
        if not self._path.is_file():
            return
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise PrivacyError(f"{self._path}: nobody knows what this client has released: {error}") from None
        self.ledger.load_state(state)
        self._last = str(state.get("last", ""))

    def _write(self, state: dict[str, Any]) -> None:
        settings, most = self.settings, self.ledger.most
        account: dict[str, Any] = {
            "unit": settings.name,
            "noise_multiplier": self.release.noise_multiplier,
            "sampling": self.release.sampling,
            "steps": self.release.steps,
            "delta": settings.delta,
            "allowed": self.ledger.allowed,
        }
        if settings.noise == "local":
            account["epsilon"] = spent_epsilon(settings, self.release, most)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json({**state, "last": self._last, "account": account}, self._path)


def with_noise(residues: Integers, settings: Settings, terms: Terms, secret: bytes) -> Integers:
    """A client's residues with its share of a sum's noise (``privacy.noise=sum``), modulo the sum's modulus."""
    assert terms.radius is not None and terms.modulus is not None
    share = noise_deviation(settings, terms.radius)
    noise = discrete_gaussians(residues.shape, share, Stream(_key(secret, _NOISE)))
    found: Integers = (residues + noise) % terms.modulus
    return found


def secret_of(settings: Settings, server_round: int, partition: int, drawn: bytes) -> bytes:
    """What a message's noise comes from, 32 bytes: what was drawn for it, unless an experiment wants to be repeated.

    Args:
        drawn: 32 bytes from the operating system, of this message alone.
    """
    seed = settings.privacy.noise_seed
    if seed is None:
        return drawn
    return hashlib.sha256(f"noise of an experiment/{seed}/{server_round}/{partition}".encode()).digest()


def _normals(secret: bytes) -> Normals:
    stream = Stream(_key(secret, _NOISE))
    return lambda shape: torch.from_numpy(normals(tuple(shape), stream)).float()


def _key(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.sha256(secret + purpose).digest()
