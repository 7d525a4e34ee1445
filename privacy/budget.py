"""From a run's settings to what its clients do: how much noise, how often they may answer, and what that promises.

Shapes of trust: with ``noise=local`` every message is private by itself, also from the server;
with ``noise=sum`` every client adds a share of the noise, and only the sum of ``least_replies`` of them has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from privacy.accounting import (
    MAX_RELEASES,
    Release,
    epsilon_of,
    epsilon_of_concentrated,
    epsilon_of_secret_rounds,
    least_noise,
    most_releases,
    noise_for,
    releases_within,
)
from privacy.errors import PrivacyError
from privacy.settings import PrivacySettings

SHARES_OF_NOISE = 1e-9
"""What a sum of clients' discrete noises is worse by than one discrete Gaussian, as it adds to sensitivity over
deviation: tau times the root of the number of values (``discrete.sum_tau``). Of shares whose deviation is at least
``LEAST_SHARE`` tau is below 1e-14 for 128 clients; the root of 1e9 values is 3.2e4."""
LEAST_SHARE = 2.0
"""Standard deviation of one client's discrete noise, in integers."""


@dataclass(frozen=True)
class Course:
    """How a run is to go, as far as that is known before it."""

    most_releases: int  # of one client, if every client that is drawn answers
    rounds: Sequence[tuple[int, int]]  # of each how many clients are drawn, of how many


def settled(settings: PrivacySettings, course: Course) -> PrivacySettings:
    """The same with all that the run's clients have to agree on: ``releases``, and for ``client_dp`` the noise.

    What is set already stays, so that a resumed run goes on with what it began with.

    Raises:
        PrivacyError: the budget does not allow a single message.
    """
    if not settings.is_private:
        return settings
    releases, noise = settings.releases, settings.noise_multiplier
    if settings.name == "record_dp":  # its noise depends on each client's number of windows
        known = releases is not None or noise is not None
        return settings if known else replace(settings, releases=course.most_releases)
    if noise is None:
        assert settings.epsilon is not None
        releases = releases or course.most_releases
        noise = _noise(settings, releases, course.rounds)
    elif settings.epsilon is not None and not settings.secret_sampling:
        releases = min(_allowed(settings, Release(noise)), releases or MAX_RELEASES)
    return replace(settings, releases=releases, noise_multiplier=noise)


def _noise(settings: PrivacySettings, releases: int, rounds: Sequence[tuple[int, int]]) -> float:
    budget, delta = settings.epsilon, settings.delta
    assert budget is not None
    what = f"privacy.epsilon={budget:g}"
    plain = least_noise(lambda noise: spent_epsilon(settings, Release(noise), releases), budget, what)
    if not settings.secret_sampling:
        return plain
    try:
        secret = least_noise(lambda noise: epsilon_of_secret_rounds(noise, rounds, delta), budget, what)
    except PrivacyError:
        return plain
    return min(plain, secret)


def release_of(settings: PrivacySettings, sampling: float, steps: int) -> Release:
    """What one message of a client is, as settled.

    Args:
        sampling: ``record_dp``: the probability with which a window takes part in a step.
        steps: ``record_dp``: of one message.

    Raises:
        PrivacyError: no noise is enough.
    """
    if settings.name == "client_dp":
        assert settings.noise_multiplier is not None, "settled() gives it"
        return Release(settings.noise_multiplier)
    noise = settings.noise_multiplier
    if noise is None:
        assert settings.epsilon is not None and settings.releases is not None, "settled() gives it"
        noise = _noise_of_records(
            settings.epsilon, settings.delta, settings.releases, sampling, steps, settings.accountant
        )
    return Release(noise, sampling, steps)


def allowed_releases(settings: PrivacySettings, release: Release) -> int | None:
    """How often a client may answer whose messages are such; None: there is no bound.

    Raises:
        PrivacyError: not even once.
    """
    follows = settings.name == "record_dp" and settings.noise_multiplier is None  # the noise, from the releases
    if settings.epsilon is None or settings.secret_sampling or follows:
        return settings.releases
    return min(_allowed(settings, release), settings.releases or MAX_RELEASES)


def rounds_fit(settings: PrivacySettings, rounds: Sequence[tuple[int, int]], most_releases: int) -> bool:
    """Whether what is seen of sums alone stays within the budget.

    Args:
        rounds: as ``Course.rounds``, those to come included.
        most_releases: of one client, likewise.
    """
    if settings.epsilon is None:
        return True
    return epsilon_of_sums(settings, rounds, most_releases) <= settings.epsilon * (1 + 1e-9)


def epsilon_of_sums(settings: PrivacySettings, rounds: Sequence[tuple[int, int]], most_releases: int) -> float:
    """What those who see sums alone (the adapter after each round) learn of one client, ``noise=sum``."""
    assert settings.noise_multiplier is not None, "settled() gives it"
    plain = spent_epsilon(settings, Release(settings.noise_multiplier), most_releases)
    if not settings.secret_sampling:
        return plain
    return min(plain, epsilon_of_secret_rounds(settings.noise_multiplier, rounds, settings.delta))


def spent_epsilon(settings: PrivacySettings, release: Release, releases: int) -> float:
    """What so many of a client's messages gave away to whom the setting protects it from."""
    if settings.is_discrete:
        return epsilon_of_concentrated(
            0.5 * (1 / release.noise_multiplier + SHARES_OF_NOISE) ** 2, releases, settings.delta
        )
    return epsilon_of(release, releases, settings.delta, settings.accountant)


def deviation(settings: PrivacySettings, least_replies: int) -> float:
    """Standard deviation of the noise that one client adds to every value of its update (``client_dp``).

    Args:
        least_replies: ``noise=sum``: with fewer a round comes to nothing, so that the noise of so many is in each sum.
    """
    assert settings.noise_multiplier is not None, "settled() gives it"
    shares = least_replies if settings.noise == "sum" else 1
    return settings.clip * settings.noise_multiplier / math.sqrt(shares)


def _allowed(settings: PrivacySettings, release: Release) -> int:
    budget = settings.epsilon
    assert budget is not None
    if settings.name == "record_dp":
        allowed = _releases_of_records(release, budget, settings.delta, settings.accountant)
    else:
        allowed = most_releases(lambda releases: spent_epsilon(settings, release, releases) <= budget)
    if not allowed:
        raise PrivacyError(
            f"privacy.noise_multiplier={release.noise_multiplier:g} spends more than privacy.epsilon="
            f"{settings.epsilon:g} in one message: raise one of them, or leave privacy.noise_multiplier=null"
        )
    return allowed


_noise_of_records = lru_cache(noise_for)  # takes seconds
_releases_of_records = lru_cache(releases_within)
