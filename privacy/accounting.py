"""How much noise a budget asks for, and what noise gives away: epsilon and delta of a whole run, both ways.

Neighbours are data sets of which one holds nothing in the place of one unit (a training window or a client) of the
other: its gradient or update counts as zero ("zero-out", Kairouz et al. 2021, "Practical and Private (Deep) Learning
without Sampling or Shuffling", definition 1.1). So how many units there are is no secret, and a sum clipped to ``clip``
has sensitivity ``clip``. Replacing a unit by another one costs at most what noise of half the multiplier would.

All figures are ``dp-accounting``'s: privacy loss distributions (Doroshenko et al. 2022, "Connect the Dots") or Renyi
divergences (Mironov, Talwar, Zhang 2019). That library is loaded when the first figure is asked for.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from privacy.errors import PrivacyError

if TYPE_CHECKING:  # it takes half a second to load, and most runs add no noise: every function that needs it does
    import dp_accounting as dp

MAX_RELEASES = 1 << 20
MAX_NOISE = 1e6
_TOLERANCE = 1e-4
_TINY = 1e-9


@dataclass(frozen=True)
class Release:
    """What one message of a client gives away of one unit by itself, ``steps`` times in a row.

    ``sampling`` is the probability with which a unit takes part in a step (Poisson), secretly; 1: it always does.
    """

    noise_multiplier: float  # standard deviation over sensitivity
    sampling: float = 1.0
    steps: int = 1

    def event(self, releases: int) -> dp.DpEvent:
        """Of so many such messages, each of which may depend on those before."""
        import dp_accounting as dp

        once = dp.GaussianDpEvent(self.noise_multiplier)
        if self.sampling < 1:
            once = dp.PoissonSampledDpEvent(self.sampling, once)
        return dp.SelfComposedDpEvent(once, self.steps * releases) if releases else dp.NoOpDpEvent()


def epsilon_of(release: Release, releases: int, delta: float, accountant: str = "pld") -> float:
    """What so many messages give away, at least 0; infinite where no bound is known."""
    import dp_accounting as dp

    if release.sampling == 1 and releases:  # Gaussians compose to a Gaussian, of which all is known (Balle, Wang 2018)
        return float(dp.get_epsilon_gaussian(release.noise_multiplier / math.sqrt(release.steps * releases), delta))
    return _epsilon(release.event(releases), delta, accountant)


def epsilon_if_replaced(release: Release, releases: int, delta: float) -> float | None:
    """The same for neighbours of which one holds another unit in the place of one; None: no bound is known here, as
    steps are sampled."""
    if release.sampling < 1:
        return None
    return epsilon_of(Release(release.noise_multiplier / 2, 1.0, release.steps), releases, delta)


def epsilon_of_secret_rounds(noise_multiplier: float, rounds: Sequence[tuple[int, int]], delta: float) -> float:
    """Of sums of which only the result is seen, and never who took part: amplification by sampling a fixed number
    without replacement (Wang, Balle, Kasiviswanathan 2019), by Renyi divergences.

    Args:
        noise_multiplier: of the sum, over ``clip``.
        rounds: of every one how many clients were drawn, of how many.

    Returns:
        The bound for a client replaced by another, which holds for one replaced by nothing as well.
    """
    import dp_accounting as dp

    sums = dp.GaussianDpEvent(noise_multiplier / 2)
    events = [
        dp.SelfComposedDpEvent(dp.SampledWithoutReplacementDpEvent(pool, drawn, sums) if drawn < pool else sums, count)
        for (drawn, pool), count in Counter(rounds).items()
    ]
    return _epsilon(dp.ComposedDpEvent(events), delta, "rdp", replaced=True)


def epsilon_of_concentrated(rho: float, releases: int, delta: float) -> float:
    """Of so many messages, each of which is ``rho``-zero-concentrated (Bun and Steinke 2016)."""
    import dp_accounting as dp

    return _epsilon(dp.SelfComposedDpEvent(dp.ZCDpEvent(rho), releases), delta, "rdp") if releases else 0.0


def noise_for(
    epsilon: float, delta: float, releases: int, sampling: float = 1.0, steps: int = 1, accountant: str = "pld"
) -> float:
    """The least noise multiplier of which so many messages stay within epsilon at delta; inverse of ``epsilon_of``, to
    the safe side.

    Raises:
        PrivacyError: none does.
    """

    def spends(noise_multiplier: float) -> float:
        return epsilon_of(Release(noise_multiplier, sampling, steps), releases, delta, accountant)

    precision = _TOLERANCE if sampling < 1 else _TOLERANCE / 100  # where it is known in closed form
    return least_noise(spends, epsilon, f"epsilon={epsilon:g} at delta={delta:g}", precision)


def releases_within(release: Release, epsilon: float, delta: float, accountant: str = "pld") -> int:
    """How many such messages stay within epsilon at delta, ``MAX_RELEASES`` at most; 0: not even one."""
    return most_releases(lambda releases: epsilon_of(release, releases, delta, accountant) <= epsilon)


def most_releases(fits: Callable[[int], bool]) -> int:
    """The largest number, ``MAX_RELEASES`` at most, for which something holds that holds for all smaller ones; 0: not
    even for 1."""
    low, high = 0, 1
    while high < MAX_RELEASES and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def least_noise(spends: Callable[[float], float], budget: float, what: str, precision: float = _TOLERANCE) -> float:
    """The least noise multiplier that stays within a budget, to the safe side.

    An evaluation may take a second, and epsilon over noise is nearly a straight line on logarithmic scales: so both
    ends are drawn to where such a line crosses the budget, and every fourth step halves, whatever the curve is like.

    Args:
        spends: noise multiplier -> epsilon, which falls.
        budget: epsilon at most.
        what: names what was asked for, in an error.
        precision: of the multiplier, relative.

    Raises:
        PrivacyError: no noise is enough.
    """
    high, at_high = 1.0, spends(1.0)
    while at_high > budget:
        high *= 2
        if high > MAX_NOISE:
            raise PrivacyError(f"no noise is enough for {what}")
        at_high = spends(high)
    low, at_low = high / 2, spends(high / 2)
    while low > 1 / MAX_NOISE and at_low <= budget:
        high, at_high, low = low, at_low, low / 2
        at_low = spends(low)
    step = 0
    while high - low > precision * high:
        margin, step = precision * high / 4, step + 1
        middle = (low + high) / 2
        if step % 4 and budget < at_low < math.inf:
            share = math.log(at_low / budget) / math.log(at_low / max(at_high, budget * _TINY))
            crossing = low * (high / low) ** share + (margin if step % 2 else -margin)  # first above it, then below
            middle = min(max(crossing, low + margin), high - margin)
        if (at_middle := spends(middle)) <= budget:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return high


def _epsilon(event: dp.DpEvent, delta: float, accountant: str, *, replaced: bool = False) -> float:
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relations = dp.NeighboringRelation
    with _orders_that_fail_left_out():
        found = (PLDAccountant if accountant == "pld" else RdpAccountant)(
            neighboring_relation=relations.REPLACE_ONE if replaced else relations.REPLACE_SPECIAL
        )
        found.compose(event)
        return max(0.0, float(found.get_epsilon(delta)))


@contextmanager
def _orders_that_fail_left_out() -> Iterator[None]:
    """Renyi orders that cannot be computed are left out of a minimum, which stays a bound: no warning for each."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
