"""Streams, normals and discrete noise: what is drawn has the distribution that it claims, to within 1e-6.

Seeds are fixed, so a test either always passes or never; 1e-6 is how likely a right sampler would have failed it when
its seed was chosen.
"""

from __future__ import annotations

import math

import mpmath  # type: ignore[import-untyped]  # comes with torch
import numpy as np
import pytest
from scipy import stats

from privacy.discrete import _table, discrete_gaussians, sum_divergence, sum_tau
from privacy.errors import PrivacyError
from privacy.normal import normals
from privacy.stream import Stream

LEVEL = 1e-6
COUNT = 200_000


def stream(number: int = 1) -> Stream:
    return Stream(number.to_bytes(32, "little"))


def exact(sigma: float, reach: int) -> list[float]:
    """P(x) for x from -reach to reach, from the definition."""
    with mpmath.workdps(50):
        weights = [mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(sigma) ** 2)) for x in range(-reach, reach + 1)]
        return [float(weight / mpmath.fsum(weights)) for weight in weights]


def is_uncorrelated(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(abs(np.corrcoef(one, other)[0, 1]) * math.sqrt(len(one)) < stats.norm.isf(LEVEL / 2))


def test_the_stream_is_chacha20s() -> None:
    """RFC 8439, appendix A.1, first test vector."""
    assert Stream(bytes(32)).bytes(16).hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_it_is_the_same_stream_however_it_is_cut() -> None:
    one, other = stream(), stream()
    assert one.bytes(7) + one.bytes(93) == other.bytes(100)
    whole = stream().integers(1000, 3_000_000_000)
    cut = stream()
    assert np.array_equal(whole, np.concatenate([cut.integers(1, 3_000_000_000) for _ in range(1000)]))


def test_fresh_streams_differ() -> None:
    assert Stream.fresh().bytes(32) != Stream.fresh().bytes(32)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_seed_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Stream(bytes(length))


@pytest.mark.parametrize("modulus", [1, 2, 3, 31, 256, 1000])
def test_integers_are_uniform(modulus: int) -> None:
    found = stream().integers(COUNT, modulus)
    assert found.dtype == np.uint32 and found.max() < modulus
    if modulus > 1:
        assert stats.chisquare(np.bincount(found, minlength=modulus)).pvalue > LEVEL
        assert is_uncorrelated(found[:-1].astype(float), found[1:].astype(float))


def test_integers_of_a_large_modulus_have_no_bias() -> None:
    """Below 3 * 2^30 a word taken modulo it would fall into the lowest third half of the time."""
    found = stream().integers(COUNT, 3 << 30)
    assert stats.chisquare(np.bincount(found >> 30, minlength=3)).pvalue > LEVEL


@pytest.mark.parametrize("modulus", [-1, 0, (1 << 32) + 1])
def test_a_modulus_out_of_range_is_refused(modulus: int) -> None:
    with pytest.raises(ValueError, match=str(modulus)):
        stream().integers(1, modulus)


def test_uniforms_lie_above_0_and_up_to_1() -> None:
    found = stream().uniforms(COUNT)
    assert found.min() > 0 and found.max() <= 1
    assert stats.kstest(found, "uniform").pvalue > LEVEL
    assert np.all(found * 2**53 % 1 == 0), "multiples of 2^-53"


def test_normals_are_normal() -> None:
    found = normals(COUNT, stream())
    assert stats.kstest(found, "norm").pvalue > LEVEL
    for order, moment in enumerate((0.0, 1.0, 0.0, 3.0, 0.0, 15.0), start=1):
        variance = float(stats.norm.moment(2 * order)) - moment**2
        off = abs(float(np.mean(found**order)) - moment) / math.sqrt(variance / COUNT)
        assert off < stats.norm.isf(LEVEL / 2), f"moment {order} is {off:.1f} standard errors off"


@pytest.mark.parametrize("bound", [3.0, 4.0])
def test_tails_of_normals_are_as_heavy_as_they_should(bound: float) -> None:
    found = normals(2_000_000, stream(2))
    for tail in (found, -found):
        beyond = int(np.count_nonzero(tail > bound))
        assert stats.binomtest(beyond, len(found), stats.norm.sf(bound)).pvalue > LEVEL


def test_normals_are_independent_between_coordinates_and_calls() -> None:
    source = stream()
    first, second = normals((2, COUNT // 2), source), normals((2, COUNT // 2), source)
    assert first.shape == (2, COUNT // 2) and first.dtype == np.float64
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[0, 1:], first[0, :-1])):
        assert is_uncorrelated(one, other)
        assert is_uncorrelated(one**2, other**2), "sine and cosine share a radius; four others hide it"


def test_normals_do_not_depend_on_how_many_are_made_at_once() -> None:
    assert np.array_equal(normals((300, 250), stream()), normals(75_000, stream()).reshape(300, 250))
    assert normals((0, 3), stream()).shape == (0, 3)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 3.7, 40.0])
def test_discrete_noise_has_its_distribution(sigma: float) -> None:
    found = discrete_gaussians(COUNT, sigma, stream())
    reach = max(1, math.floor(3.5 * sigma))
    counts = np.bincount(np.clip(found, -reach - 1, reach + 1) + reach + 1, minlength=2 * reach + 3)
    inner = np.array(exact(sigma, math.ceil(12 * sigma) + 2))
    middle = len(inner) // 2
    tail = inner[: middle - reach].sum()
    expected = np.concatenate(([tail], inner[middle - reach : middle + reach + 1], [tail])) * COUNT
    kept = expected > 5
    assert stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue > LEVEL
    variance = float(np.sum(inner * (np.arange(len(inner)) - middle) ** 2))
    fourth = float(np.sum(inner * (np.arange(len(inner)) - middle) ** 4.0))
    assert abs(np.mean(found)) < stats.norm.isf(LEVEL / 2) * math.sqrt(variance / COUNT)
    off = abs(np.mean(found.astype(float) ** 2) - variance) / math.sqrt((fourth - variance**2) / COUNT)
    assert off < stats.norm.isf(LEVEL / 2)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.7, 100.0])
def test_the_table_is_exact_to_the_last_bits(sigma: float) -> None:
    """Against the definition, in arithmetic that shares nothing with the table's."""
    table = _table(sigma)
    with mpmath.workdps(60):
        weights = [
            mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(sigma) ** 2)) for x in range(-table.reach, table.reach)
        ]
        total = mpmath.fsum(weights) + weights[0]
        below = mpmath.mpf(0)
        for weight, entry in zip(weights, table.exact, strict=True):
            below += weight
            assert abs(below / total * 2**128 - entry) <= 2, "units of 2^-128"


def test_a_word_that_does_not_decide_is_followed_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It happens once in 2^60 draws, so the words are made up: the upper half of an entry, then a lower half."""
    table = _table(3.0)
    place = table.reach  # of x = 0
    high, low = divmod(table.exact[place], 1 << 64)
    source = stream()
    for second, x in ((low - 1, 0), (low, 1), (low + 1, 1)):
        words = iter([[high], [second]])
        monkeypatch.setattr(source, "words", lambda count, words=words: np.array(next(words), dtype=np.uint64))
        assert discrete_gaussians(1, 3.0, source)[0] == x


def test_discrete_noise_is_independent_between_coordinates_and_calls() -> None:
    source = stream()
    first, second = (discrete_gaussians((2, COUNT // 2), 2.0, source).astype(float) for _ in range(2))
    for one, other in ((first[0], first[1]), (first[0], second[0]), (first[0, 1:], first[0, :-1])):
        assert is_uncorrelated(one, other)
        assert is_uncorrelated(one**2, other**2)


def test_no_noise_is_none() -> None:
    assert not discrete_gaussians((3, 4), 0.0, stream()).any()


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf, 40_000.0])
def test_a_sigma_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(PrivacyError, match="must lie between"):
        discrete_gaussians(1, sigma, stream())


@pytest.mark.parametrize(("sigma", "count"), [(0.5, 2), (0.5, 6), (0.8, 10), (1.2, 4)])
def test_a_sum_of_shares_lies_within_its_bound(sigma: float, count: int) -> None:
    """The whole distribution of the sum, by convolution, against the one it stands for."""
    with mpmath.workdps(40):
        reach = math.ceil(10 * sigma)
        share = [mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(sigma) ** 2)) for x in range(-reach, reach + 1)]
        total = mpmath.fsum(share)
        share = [weight / total for weight in share]
        summed = [mpmath.mpf(1)]
        for _ in range(count):
            longer = [mpmath.mpf(0)] * (len(summed) + 2 * reach)
            for place, one in enumerate(summed):
                for offset, other in enumerate(share):
                    longer[place + offset] += one * other
            summed = longer
        middle = len(summed) // 2
        variance = count * mpmath.mpf(sigma) ** 2
        norm = mpmath.nsum(lambda x: mpmath.exp(-(x**2) / (2 * variance)), [-60, 60])
        largest = max(
            abs(mpmath.log(summed[middle + x] * norm) + mpmath.mpf(x) ** 2 / (2 * variance))
            for x in range(-math.ceil(5 * sigma), math.ceil(5 * sigma) + 1)
        )
        bound = sum_divergence(sigma, count)
        assert bound / 1000 < largest <= bound, "a bound, and one that is not idle"
    assert sum_tau(sigma, count) == 2 * bound


def test_one_share_is_no_sum_and_a_coarse_share_has_no_bound() -> None:
    assert sum_divergence(1.0, 1) == 0
    with pytest.raises(PrivacyError, match="too coarse"):
        sum_tau(0.49, 3)
