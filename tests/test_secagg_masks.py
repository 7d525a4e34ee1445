"""What a masked message gives away: nothing, to whoever knows less than all of its masks.

The operating system's randomness is replaced by a stream with a seed, so that each test either always passes or never;
a right implementation would have failed it with a probability of 1e-6 when the seed was chosen.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from secagg_cohort import Cohort, unpack

from privacy.secagg import Contribution
from privacy.secagg.masks import add_mask, sign_of
from privacy.stream import Stream

LEVEL = 1e-6
MODULUS, LENGTH, ROUNDS = 7, 12, 400


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", Stream(bytes(32)).bytes)


def masked(cohort: Cohort, value: int, known: tuple[int, ...] = (), *, knows_self: bool = False) -> NDArray[np.int64]:
    """[ROUNDS, LENGTH] masked messages of the first client, who sends ``value`` all over, every round; less the masks
    that it shares with ``known`` clients and, where that was opened, its self mask."""
    found = np.empty((ROUNDS, cohort.length), dtype=np.int64)
    opened = {partition: cohort.party(partition) for partition in known}
    for number in range(ROUNDS):
        invitation = cohort.invite(number)
        self_seed: list[bytes] = []

        def urandom(count: int, *, draw: object = os.urandom, kept: list[bytes] = self_seed) -> bytes:
            kept.append(draw(count))  # type: ignore[operator]
            return kept[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "urandom", urandom)
            values = np.full(cohort.length, value)
            data = cohort.party(0).contribute(values, invitation, number, lambda all_: all_.astype("<u4").tobytes())
        total = unpack(Contribution.unpack(data.pack(invitation), invitation).masked).astype(np.int64)
        for partition in opened:
            channel = cohort.keys[partition].channel(cohort.keys[0].public, invitation.digest)
            add_mask(total, channel.seed, -sign_of(0, partition), invitation)
        if knows_self:
            (seed,) = (drawn for drawn in self_seed if len(drawn) == 16)
            add_mask(total, seed, -1, invitation)
        found[number] = total % cohort.modulus
    return found


def assert_uniform(found: NDArray[np.int64]) -> None:
    """Every element by itself, all together, and neighbours."""
    assert stats.chisquare(np.bincount(found.ravel(), minlength=MODULUS)).pvalue > LEVEL
    for element in found.T:
        assert stats.chisquare(np.bincount(element, minlength=MODULUS)).pvalue > LEVEL / LENGTH
    pairs = np.bincount((found[:, :-1] * MODULUS + found[:, 1:]).ravel(), minlength=MODULUS**2)
    assert stats.chisquare(pairs).pvalue > LEVEL, "neighbours in a message"
    rounds = np.bincount((found[:-1] * MODULUS + found[1:]).ravel(), minlength=MODULUS**2)
    assert stats.chisquare(rounds).pvalue > LEVEL, "one place in two rounds"


def cohort_of(clients: int) -> Cohort:
    return Cohort(clients, modulus=MODULUS, length=LENGTH)


def test_masked_messages_are_uniform_and_do_not_depend_on_what_is_sent() -> None:
    cohort = cohort_of(3)
    one, cohort.states = masked(cohort, 0), {}
    other = masked(cohort, 4)
    assert_uniform(one)
    assert_uniform(other)
    table = np.stack([np.bincount(found.ravel(), minlength=MODULUS) for found in (one, other)])
    assert stats.chi2_contingency(table).pvalue > LEVEL
    assert not np.array_equal(one, (other - 4) % MODULUS), "not the same masks again"


@pytest.mark.parametrize("case", ["all but one, and the self mask", "everybody else"])
def test_what_colluders_know_leaves_a_message_uniform(case: str) -> None:
    """Of 5 clients, threshold 3. Where the self mask was opened, one honest client's mask hides the message; where all
    shared masks were, as for a client that is said to have dropped out, the self mask does."""
    cohort = cohort_of(5)
    others = cohort.partitions[1:]
    is_self = case.startswith("all but one")
    assert_uniform(masked(cohort, 2, others[:-1] if is_self else others, knows_self=is_self))


def test_who_knows_all_masks_has_the_message() -> None:
    """So the tests above would notice masks that are missing."""
    cohort = cohort_of(3)
    assert np.all(masked(cohort, 2, cohort.partitions[1:], knows_self=True) == 2)
