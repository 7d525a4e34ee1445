"""The accountant, against published figures; noise for a budget, and back."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from privacy.accounting import (
    Release,
    epsilon_if_replaced,
    epsilon_of,
    epsilon_of_concentrated,
    epsilon_of_secret_rounds,
    noise_for,
    releases_within,
)
from privacy.errors import PrivacyError

DELTA = 1e-5


def moments_accountant(release: Release, releases: int) -> float:
    """As the papers of 2016 to 2020 have it: Renyi divergence plus log(1 / delta) / (order - 1), the least of them."""
    orders = np.array([1 + x / 10 for x in range(1, 600)])
    accountant: Any = RdpAccountant(orders, dp.NeighboringRelation.ADD_OR_REMOVE_ONE).compose(release.event(releases))
    return min(
        float(rdp + math.log(1 / DELTA) / (order - 1))
        for order, rdp in zip(accountant.orders, accountant.rdp, strict=True)
        if math.isfinite(rdp)
    )


@pytest.mark.parametrize(
    ("release", "published"),
    [
        # Abadi et al. 2016, section 5.1 and figure 2: q = 0.01, sigma = 4, 100 epochs
        (Release(4.0, 0.01, 10_000), 1.26),
        # Bu et al. 2020, "Deep Learning with Gaussian Differential Privacy", figure 4: MNIST, 20 and 70 epochs
        (Release(1.3, 256 / 60_000, 20 * 60_000 // 256), 1.34),
        (Release(0.7, 256 / 60_000, 70 * 60_000 // 256), 8.68),
    ],
)
def test_published_figures(release: Release, published: float) -> None:
    """The events are theirs, as their own accounting of them gives their figures; ours is tighter, never looser."""
    assert moments_accountant(release, 1) == pytest.approx(published, abs=0.012)
    by_rdp, by_pld = (epsilon_of(release, 1, DELTA, accountant) for accountant in ("rdp", "pld"))
    assert 0.6 * published < by_pld <= by_rdp < published


def test_the_gaussian_mechanism_is_exact() -> None:
    """Balle and Wang 2018, theorem 8: delta = Phi(1 / 2s - e s) - exp(e) Phi(-1 / 2s - e s)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for noise, releases in ((1.0, 1), (3.7, 9)):
        sigma = noise / math.sqrt(releases)
        epsilon = epsilon_of(Release(noise), releases, DELTA)
        delta = phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)
        assert delta == pytest.approx(DELTA, rel=1e-3)
    assert epsilon_of(Release(1.0), 1, DELTA) == pytest.approx(4.3772, abs=1e-3)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("epsilon", [0.25, 2.0, 8.0])
def test_noise_for_a_budget_and_back(epsilon: float, accountant: str) -> None:
    noise = noise_for(epsilon, DELTA, 8, 0.1, 10, accountant)
    spent = epsilon_of(Release(noise, 0.1, 10), 8, DELTA, accountant)
    assert 0.99 * epsilon < spent <= epsilon
    assert epsilon_of(Release(0.99 * noise, 0.1, 10), 8, DELTA, accountant) > epsilon * 0.999


def test_releases_within_a_budget() -> None:
    release = Release(3.0)
    allowed = releases_within(release, 8.0, DELTA)
    assert epsilon_of(release, allowed, DELTA) <= 8.0 < epsilon_of(release, allowed + 1, DELTA)
    assert releases_within(Release(0.1), 1.0, DELTA) == 0
    assert epsilon_of(release, 0, DELTA) == 0


def test_replacing_costs_at_most_twice_the_sensitivity() -> None:
    one, other = epsilon_of(Release(4.0), 3, DELTA), epsilon_if_replaced(Release(4.0), 3, DELTA)
    assert other == pytest.approx(epsilon_of(Release(2.0), 3, DELTA))
    assert other is not None and one < other
    assert epsilon_if_replaced(Release(4.0, 0.1), 3, DELTA) is None


def test_secrecy_of_who_takes_part_helps_where_few_of_many_do() -> None:
    few, all_of_them = [(10, 1000)] * 100, [(10, 10)] * 100
    assert epsilon_of_secret_rounds(2.0, few, DELTA) < 0.2 * epsilon_of_secret_rounds(2.0, all_of_them, DELTA)
    # replaced, not zero-out: of rounds with everybody in them nothing is saved beside plain composition
    assert epsilon_of_secret_rounds(2.0, all_of_them, DELTA) == pytest.approx(
        epsilon_of(Release(1.0), 100, DELTA, "pld"), rel=0.1
    )


def test_concentrated_is_that_of_the_gaussian() -> None:
    """A Gaussian of multiplier z is (1 / 2 z^2)-zero-concentrated (Bun and Steinke 2016, proposition 1.6)."""
    assert epsilon_of_concentrated(1 / (2 * 3.0**2), 4, DELTA) == pytest.approx(
        epsilon_of(Release(3.0), 4, DELTA, "rdp"), rel=0.1
    )
    assert epsilon_of_concentrated(0.5, 0, DELTA) == 0


def test_no_noise_is_enough() -> None:
    with pytest.raises(PrivacyError, match="no noise is enough for epsilon=1e-09"):
        noise_for(1e-9, 1e-12, 1 << 19)
