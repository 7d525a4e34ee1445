"""The server's part of a run's privacy: what its clients are to do, and how often whom may be asked, on its disk."""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adapters.settings import num_steps, sampling_rate
from conf.output import write_json
from conf.schema import Settings
from privacy.budget import Course, allowed_releases, release_of, rounds_fit, settled
from privacy.errors import BudgetSpentError, PrivacyError
from privacy.guarantee import guarantee
from privacy.ledger import Fits, Ledger
from privacy.settings import PrivacySettings
from server.records.results import RunResults
from strategies.sampling import Sampling

LEDGER, REPORT = "privacy-ledger.json", "privacy.json"


def course_of(settings: Settings) -> Course:
    """How the run is to go if every client answers."""
    federation = settings.federation
    drawn, of = federation.clients_per_round, federation.num_clients
    rounds = [(drawn, of)] * federation.rounds
    if settings.privacy.secret_sampling:  # who is drawn is not known before
        return Course(federation.rounds, rounds)
    return Course(_how_far(settings, None)[1], rounds)


class Books:
    """What a run may release, and what it has."""

    def __init__(self, settings: Settings, output: Path, goes_on: bool) -> None:
        """Settles ``settings.privacy``.

        Args:
            settings: of the run.
            output: its folder.
            goes_on: it began before, and what it had released stands in the folder.

        Raises:
            PrivacyError: the budget allows no message, or nobody knows what is left of it.
        """
        settings.privacy = settled(settings.privacy, course_of(settings))
        self.settings = settings
        self._output = output
        self._secret = secrets.token_hex(32)
        self._sums = 0  # that clients were invited to
        self.ledger = self._ledger(goes_on) if settings.privacy.protects else None

    @property
    def draws(self) -> int | str:
        """The seed of who is asked: clients know the run's, and this server alone the other."""
        return self._secret if self.settings.privacy.secret_sampling else self.settings.seed

    @property
    def num_closed(self) -> int:
        """Clients that said themselves that their budget is spent."""
        return 0 if self.ledger is None else len(self.ledger.closed)

    def next_sum(self) -> int:
        """The number of another masked sum, written down: clients take part in each number once, from round to round
        and over resumes."""
        self._sums += 1
        self._write({} if self.ledger is None else self.ledger.state())
        return self._sums

    def report(self, results: RunResults) -> None:
        """Puts down what is promised by now, in the results and in a file of its own. Raises OutputError."""
        privacy, least = self.settings.privacy, self.settings.federation.min_replies
        results.privacy = guarantee(privacy, self.ledger, least)
        write_json(results.privacy, self._output / REPORT)

    def _ledger(self, goes_on: bool) -> Ledger:
        privacy, path = self.settings.privacy, self._output / LEDGER
        ledger = Ledger(privacy.releases, self._write, _fits(privacy))
        if not goes_on:
            path.unlink(missing_ok=True)  # of another run in the same folder
            return ledger
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            ledger.load_state(state["ledger"])
            self._secret, self._sums = str(state["secret"]), int(state["sums"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise PrivacyError(f"{path}: nobody knows what this run has released: {error!r}") from None
        return ledger

    def _write(self, state: dict[str, Any]) -> None:
        write_json({"ledger": state, "secret": self._secret, "sums": self._sums}, self._output / LEDGER)
        (self._output / LEDGER).chmod(0o600)


def planned(settings: Settings) -> Settings:
    """The settings as a run would settle them. Raises PrivacyError: the budget allows no message."""
    return replace(settings, privacy=settled(settings.privacy, course_of(settings)))


def promise(settings: Settings, num_windows: int | None) -> str:
    """What a dry run says of it.

    Args:
        settings: as set.
        num_windows: of a client of mean size; None: not known.

    Raises:
        PrivacyError: the budget allows no message.
    """
    privacy = settings.privacy
    seen = "the server sees sums alone" if privacy.secure_aggregation else "the server sees every update"
    if not privacy.is_private:
        return f"none: {seen}, and the adapter may tell of single records"
    settings = planned(settings)
    privacy = settings.privacy
    allowed, noise = privacy.releases, privacy.noise_multiplier
    if privacy.name == "record_dp" and num_windows is not None:
        rate = sampling_rate(settings.train, num_windows)
        release = release_of(privacy, rate, num_steps(settings.train, num_windows))
        allowed, noise = allowed_releases(privacy, release), release.noise_multiplier
    rounds, most = _how_far(settings, allowed)
    budget = "no bound on epsilon" if privacy.epsilon is None else f"epsilon {privacy.epsilon:g}"
    of_whom = "a training window" if privacy.name == "record_dp" else "a client"
    multiplier = "noise by each client's number of windows" if noise is None else f"noise {noise:.3g} x clip"
    where = "in the sum of a round" if privacy.noise == "sum" else "in every message"
    text = (
        f"{privacy.name}: {budget} of {of_whom} at delta {privacy.delta:g} for the whole run; {multiplier} "
        f"({privacy.clip:g}) {where}, at most {'any number of' if allowed is None else allowed} answers a client, "
        f"of which the rounds ask for {most}; {seen}"
    )
    if rounds < settings.federation.rounds:
        text += f". THE BUDGET IS SPENT AFTER ROUND {rounds} of {settings.federation.rounds}: the run ends there"
    return text


def _how_far(settings: Settings, allowed: int | None) -> tuple[int, int]:
    """How many rounds the budget allows if every client answers, and the answers of the client that gives most."""
    federation = settings.federation
    ledger = Ledger(allowed, lambda state: None, _fits(settings.privacy))
    sampling = Sampling(federation.num_clients, federation.clients_per_round, settings.seed, ledger=ledger)
    done = 0
    try:
        for done in range(federation.rounds):
            sampling.asked(done + 1, sampling.sample(done + 1, federation.min_replies))
        done = federation.rounds
    except BudgetSpentError:
        pass
    return done, ledger.most


def _fits(privacy: PrivacySettings) -> Fits | None:
    """Where rounds are drawn in secret they are counted as a whole, and clients' own counts do not bound them."""
    return partial(rounds_fit, privacy) if privacy.secret_sampling else None
