"""How much one client may add, as numbers."""

from __future__ import annotations

import math

import pytest

from strategies.errors import FederationError
from strategies.norms import NormBound
from strategies.settings import StrategySettings, check_strategy


def scales(bound: NormBound, norms: list[float]) -> list[float | None]:
    usual = bound.reference(norms)
    return [bound.scale(norm, usual) for norm in norms]


def test_a_long_update_is_scaled_and_one_that_is_longer_by_far_refused() -> None:
    assert scales(NormBound(3, 10), [1, 1.2, 0.8, 6, 12.1]) == [1, 1, 1, pytest.approx(0.6), None]


def test_clients_with_more_data_are_taken() -> None:
    """Ten times the data, so ten times the steps, is three times the norm where steps are independent."""
    assert scales(NormBound(3, 10), [1, 0.5, math.sqrt(10) * 0.9, 1, 2]) == [1] * 5


def test_of_two_the_shorter_is_usual_and_history_counts_for_more() -> None:
    bound = NormBound(3, 10)
    assert scales(bound, [1000, 1]) == [None, 1]
    bound.averaged([1, 1, 1])
    assert scales(bound, [1000]) == [None], "alone in its round"
    assert scales(bound, [2, 2.5]) == [1, 1]


def test_all_may_grow_together_but_a_majority_of_attackers_only_so_far() -> None:
    bound = NormBound(3, 10)
    bound.averaged([1, 1, 1])
    assert scales(bound, [5, 6, 7]) == [1, 1, 1]
    assert scales(bound, [1000, 1000, 1000, 1]) == [None, None, None, 1]


def test_zeros_and_a_first_reply_alone_say_nothing_against_others() -> None:
    assert scales(NormBound(3, 10), [0, 0, 0, 2]) == [1, 1, 1, 1]
    assert scales(NormBound(3, 10), [0.0]) == [1]
    assert scales(NormBound(None, None), [1, 1, 1, 1e9]) == [1] * 4


def test_an_absolute_bound_holds_from_the_first_reply_on_and_whatever_the_others_send() -> None:
    bound = NormBound(None, None, max_norm=2.0)
    assert scales(bound, [1, 2, 4, 1e6]) == [1, 1, 0.5, pytest.approx(2e-6)]
    assert bound.scale(8.0, None) == 0.25
    assert scales(NormBound(3, 10, max_norm=2.0), [1, 1, 1, 6, 11]) == [1, 1, 1, pytest.approx(1 / 3), None]
    assert scales(NormBound(3, 10, max_norm=5.0), [1, 1, 1, 6]) == [1, 1, 1, 0.5]


def test_state_is_given_back() -> None:
    bound, other = NormBound(3, 10), NormBound(3, 10)
    for norm in range(1, 9):
        bound.averaged([float(norm)])
    other.load_state(bound.state())
    assert other.reference([]) == bound.reference([]) == 6
    for wrong in ("x", [math.nan], [-1.0], [None], {"a": 1}):
        with pytest.raises(ValueError, match="expected"):
            other.load_state(wrong)


@pytest.mark.parametrize("key", ["clip_norm_ratio", "max_norm_ratio"])
def test_ratios_are_checked(key: str) -> None:
    settings = StrategySettings()
    for wrong in (0.5, math.nan, math.inf):
        setattr(settings, key, wrong)
        with pytest.raises(FederationError, match=rf"strategy\.{key}"):
            check_strategy(settings)
    setattr(settings, key, None)
    check_strategy(settings)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_the_absolute_bound_is_checked(wrong: float) -> None:
    with pytest.raises(FederationError, match=r"strategy\.max_norm"):
        check_strategy(StrategySettings(max_norm=wrong))
