"""Robust strategies: the rules beside byzfl's and Flower's, what they need, what they withstand, and what they keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum, Strategy
from flwr.serverapp.strategy.multikrum import compute_distances
from torch import Tensor

from conf.checks import check_settings
from conf.schema import Settings
from strategies import rules
from strategies.build import build_flower, build_inner
from strategies.errors import FederationError, RoundError
from strategies.optimizer import optimizer_state, restore_optimizer
from strategies.robust import RobustStrategy
from strategies.settings import ROBUST, StrategySettings, check_attackers, check_strategy, num_malicious
from strategies.tensors import from_record, to_record
from strategies.wire import ARRAYS, METRICS, NUM_EXAMPLES, REPLY_METRICS

ORACLE = json.loads((Path(__file__).parent / "oracles" / "byzfl.json").read_text())["cases"]
SHAPES = {"b": (3, 4), "a": (5,)}  # not in the order of their names
SIZE = 17
CURRENT = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}


def adapter_of(update_D: Tensor, current: Mapping[str, Tensor] = CURRENT) -> dict[str, Tensor]:
    parts = update_D.split([tensor.numel() for tensor in current.values()])
    return {name: tensor + part.view(tensor.shape) for (name, tensor), part in zip(current.items(), parts, strict=True)}


def reply(adapter: dict[str, Tensor], examples: float = 1.0) -> Message:
    metrics = MetricRecord(dict.fromkeys(REPLY_METRICS, 1.0))
    metrics[NUM_EXAMPLES] = examples
    return Message(RecordDict({ARRAYS: to_record(adapter), METRICS: metrics}), 1, "train")


def replies_of(updates: list[Tensor]) -> list[Message]:
    return [reply(adapter_of(update)) for update in updates]


def strategy_of(name: str, root: Tensor | None = None, **changes: Any) -> RobustStrategy:
    settings = StrategySettings(name, **changes)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in CURRENT.items()}
    own = None if root is None else lambda server_round, current: adapter_of(root, zeros)
    strategy = build_inner(settings, own)
    assert isinstance(strategy, RobustStrategy)
    strategy.current = dict(CURRENT)
    return strategy


def step_of(strategy: Strategy, updates: list[Tensor]) -> Tensor:
    arrays, metrics = strategy.aggregate_train(1, replies_of(updates))
    assert arrays is not None and metrics is not None
    new = from_record(arrays)
    assert list(new) == list(CURRENT)
    return torch.cat([(new[name] - tensor).flatten() for name, tensor in CURRENT.items()])


def honest(n: int, seed: int = 0, size: int = SIZE, spread: float = 0.3) -> list[Tensor]:
    """About a common update of ones."""
    generator = torch.Generator().manual_seed(seed)
    return [1 + spread * torch.randn(size, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: f"n{case['n']}-f{case['f']}-{len(case['centre'])}")
def test_rules_are_those_of_byzfl(case: dict[str, Any]) -> None:
    updates = [torch.tensor(update) for update in case["updates"]]
    n, f, centre = case["n"], case["f"], torch.tensor(case["centre"])
    gram_NN = rules.gram(updates)
    order = rules.krum_order(gram_NN, n - f - 1)  # byzfl's number of neighbours
    about = [update - centre for update in updates]
    clipped = rules.combined(about, rules.centred_clip(rules.gram(about), case["radius"], steps=3)) + centre
    found = {
        "krum": updates[order[0]],
        "multikrum": torch.stack([updates[i] for i in order[: n - f]]).mean(0),
        "median": rules.median(updates),
        "trimmed_mean": rules.trimmed_mean(updates, f),
        "geometric_median": rules.combined(updates, rules.geometric_median(gram_NN, steps=300, smoothing=1e-9)),
        "centred_clip": clipped,
    }
    assert found.keys() == case["rules"].keys()
    for name, expected in case["rules"].items():
        torch.testing.assert_close(found[name], torch.tensor(expected), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("seed", range(4))
def test_bulyan_is_that_of_its_paper(seed: int) -> None:
    """Step by step, without a Gram matrix."""
    n, f = 11, 2
    updates = [*honest(n - f, seed), *(torch.full((SIZE,), 1.2 + i) for i in range(f))]
    left, chosen = list(range(n)), list[int]()
    while len(chosen) < n - 2 * f:
        scores = []
        for i in left:
            near = sorted(float((updates[i] - updates[j]).double().square().sum()) for j in left if j != i)
            scores.append(sum(near[: max(1, len(left) - f - 2)]))
        chosen.append(left.pop(int(np.argmin(scores))))
    assert rules.bulyan_selection(rules.gram(updates), f) == sorted(chosen)
    stack = np.stack([updates[i].double().numpy() for i in sorted(chosen)])
    middle = np.median(stack, axis=0)
    expected = [
        np.mean(sorted(column, key=lambda v, m=m: abs(v - m))[: n - 4 * f])  # type: ignore[misc]
        for column, m in zip(stack.T, middle, strict=True)
    ]
    torch.testing.assert_close(rules.bulyan(updates, f), torch.tensor(np.array(expected)).float())


@pytest.mark.parametrize(("name", "theirs"), [("fedmedian", FedMedian()), ("fedtrimmedavg", FedTrimmedAvg(beta=0.2))])
@pytest.mark.parametrize("n", [5, 10])
def test_medians_and_trimmed_means_are_flowers(name: str, theirs: Strategy, n: int) -> None:
    updates = honest(n, seed=n)
    assert torch.allclose(step_of(strategy_of(name), updates), step_of(theirs, updates), atol=1e-6)


def test_where_flowers_trimmed_mean_cuts_too_little_ours_does_not() -> None:
    """Two of ten are malicious and one honest reply is lost: 0.2 * 9 is rounded down to one on each side."""
    updates = [*honest(7), *[torch.full((SIZE,), 1000.0)] * 2]
    assert step_of(FedTrimmedAvg(beta=0.2), updates).max() > 100
    assert step_of(strategy_of("fedtrimmedavg", malicious=0.2), updates).max() < 2


def test_krum_and_multikrum_are_flowers_where_distances_are_more_than_rounding() -> None:
    updates = [*honest(8), *[torch.full((SIZE,), -3.0)] * 2]
    assert torch.allclose(step_of(strategy_of("krum"), updates), step_of(Krum(num_malicious_nodes=2), updates))
    theirs = MultiKrum(num_malicious_nodes=2, num_nodes_to_select=8)
    assert torch.allclose(step_of(strategy_of("multikrum"), updates), step_of(theirs, updates), atol=1e-6)


def test_flowers_krum_measures_rounding_where_the_adapter_is_long() -> None:
    """The reason for a Krum of our own: updates of a hundredth on an adapter of ones, in float32."""
    size = 20_000
    updates = [0.01 * update for update in honest(8, size=size, spread=0.1)] + [torch.full((size,), -0.01)] * 2
    records = [to_record({"a": 1 + update}) for update in updates]
    true_NN = rules.squared_distances(rules.gram(updates))
    theirs_NN = torch.from_numpy(compute_distances(records)).double()
    assert float((theirs_NN - true_NN).abs().max()) > 0.3 * float(true_NN[:8, :8].max())
    assert rules.krum_order(rules.gram(updates), 6)[0] < 8


def test_examples_are_the_senders_word_and_count_for_nothing_here() -> None:
    """With Flower's Multi-Krum a chosen attacker that claims a million examples is the aggregate."""
    updates = honest(10)
    updates[3] = updates[3] + 0.1  # near enough to be chosen
    shown = [reply(adapter_of(update), 1e6 if i == 3 else 1.0) for i, update in enumerate(updates)]
    theirs, _ = MultiKrum(num_malicious_nodes=2, num_nodes_to_select=8).aggregate_train(1, shown)
    assert theirs is not None
    chosen = from_record(theirs)["a"] - CURRENT["a"]
    assert torch.allclose(chosen, updates[3][12:], atol=1e-4)
    shown = [reply(adapter_of(update), 1e6 if i == 3 else 1.0) for i, update in enumerate(updates)]
    arrays, _ = strategy_of("multikrum").aggregate_train(1, shown)
    assert arrays is not None
    assert torch.allclose(
        torch.cat([(from_record(arrays)[n] - t).flatten() for n, t in CURRENT.items()]),
        step_of(strategy_of("multikrum"), updates),
    )


@pytest.mark.parametrize("name", [name for name in ROBUST if name != "bulyan"])
@pytest.mark.parametrize("attack", [-5.0, 1e5])
def test_two_of_ten_move_no_robust_strategy_far(name: str, attack: float) -> None:
    updates = [*honest(8), *[torch.full((SIZE,), attack)] * 2]
    step = step_of(strategy_of(name, root=torch.ones(SIZE)), updates)
    assert float((step - 1).norm()) < 0.5 * SIZE**0.5
    mean = torch.stack(updates).mean(0)
    assert float((step - 1).norm()) < 0.5 * float((mean - 1).norm())


def test_two_of_eleven_do_not_move_bulyan() -> None:
    updates = [*honest(9), *[torch.full((SIZE,), 1e5)] * 2]
    assert float((step_of(strategy_of("bulyan", malicious=2.0), updates) - 1).norm()) < 0.5 * SIZE**0.5


def test_a_server_rate_scales_the_step() -> None:
    one, other = (step_of(strategy_of("fedmedian", lr=lr), honest(5)) for lr in (1.0, 0.5))
    assert torch.allclose(other, 0.5 * one, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "malicious", "least"),
    [
        ("krum", 2, 7),
        ("multikrum", 1, 5),
        ("bulyan", 2, 11),
        ("fedtrimmedavg", 3, 7),
        ("fedmedian", 2, 5),
        ("rfa", 1, 3),
        ("centredclip", 4, 9),
        ("fltrust", 9, 1),
        ("krum", 0.0, 3),
    ],
)
def test_too_few_replies_are_said_at_the_start_and_in_the_round(name: str, malicious: float, least: int) -> None:
    settings = StrategySettings(name, malicious=float(malicious))
    check_strategy(settings)
    check_attackers(settings, least)
    strategy = strategy_of(name, root=torch.ones(SIZE), malicious=float(malicious))
    step_of(strategy, honest(least))
    if least > 1:
        with pytest.raises(FederationError, match=rf"strategy.name={name} needs .* = {least} clients"):
            check_attackers(settings, least - 1)
    with pytest.raises(RoundError, match=r"round 1: .*(needs .* = \d+ clients|needs 1 clients)"):
        strategy.aggregate_train(1, replies_of(honest(least - 1)))


@pytest.mark.parametrize(
    ("malicious", "n", "expected"),
    [(0.2, 10, 2), (0.2, 9, 2), (0.3, 10, 3), (0.0, 5, 0), (3.0, 5, 3)],
)
def test_a_share_is_rounded_up_and_a_number_stays(malicious: float, n: int, expected: int) -> None:
    assert num_malicious(StrategySettings(malicious=malicious), n) == expected


@pytest.mark.parametrize("wrong", [-0.1, 0.5, 0.7, 1.5, float("nan"), float("inf")])
def test_the_number_of_attackers_is_checked(wrong: float) -> None:
    with pytest.raises(FederationError, match=r"strategy\.malicious"):
        check_strategy(StrategySettings("krum", malicious=wrong))


def test_a_run_is_checked_before_it_starts() -> None:
    settings = Settings()
    settings.strategy.name, settings.federation.clients_per_round = "bulyan", 5
    with pytest.raises(FederationError, match=r"larger federation\.clients_per_round"):
        check_settings(settings)
    settings.strategy.name = "krum"
    check_settings(settings)


def test_fltrust_wants_a_root_and_goes_its_way() -> None:
    with pytest.raises(FederationError, match=r"strategy\.name=fltrust needs"):
        build_flower(StrategySettings("fltrust"))
    root = torch.zeros(SIZE)
    root[0] = 2.0
    along, against, across = (torch.zeros(SIZE) for _ in range(3))
    along[0], against[0], across[1] = 30.0, -1.0, 1.0
    step = step_of(strategy_of("fltrust", root=root), [along, against, across])
    assert torch.allclose(step, root, atol=1e-6)
    with pytest.raises(RoundError, match="none of 2 updates has a part"):
        strategy_of("fltrust", root=root).aggregate_train(1, replies_of([against, across]))
    seen: list[tuple[int, list[str]]] = []

    def fake(server_round: int, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append((server_round, list(current)))
        return {name: torch.ones_like(tensor) for name, tensor in sorted(current.items())}

    strategy = RobustStrategy(StrategySettings("fltrust"), fake)
    strategy.current = dict(CURRENT)
    assert torch.allclose(step_of(strategy, honest(3)), torch.ones(SIZE), atol=0.5)
    assert seen == [(1, ["b", "a"])]


def test_a_centre_is_remembered_and_comes_back_from_a_checkpoint() -> None:
    """What a second round comes to depends on the first one's aggregate, before and after a resume alike."""
    first, second = honest(5), [*honest(2, seed=1), *[torch.full((SIZE,), -9.0)] * 3]
    strategy, resumed = strategy_of("centredclip"), strategy_of("centredclip")
    assert not optimizer_state(strategy)
    step_of(strategy, first)
    restore_optimizer(resumed, optimizer_state(strategy))
    after = step_of(strategy, second)
    assert torch.equal(after, step_of(resumed, second))
    assert not torch.equal(after, step_of(strategy_of("centredclip"), second))


def test_a_round_that_came_to_nothing_leaves_the_centre() -> None:
    strategy = strategy_of("centredclip")
    step_of(strategy, honest(5))
    centre = strategy.centre_D
    assert centre is not None
    before = centre.clone()
    with pytest.raises(RoundError):
        strategy.aggregate_train(2, replies_of(honest(1)))
    assert strategy.centre_D is not None and torch.equal(strategy.centre_D, before)


def test_no_temporary_grows_with_all_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices give what the whole gives; and what is made beside the updates is one slice, whatever their length."""
    updates = honest(7, size=1000)
    whole = [rules.gram(updates), rules.median(updates), rules.bulyan(updates, 1)]
    monkeypatch.setattr(rules, "SLICE", 64)
    largest = 0
    stack = torch.stack

    def watched(tensors: list[Tensor]) -> Tensor:
        nonlocal largest
        made = stack(tensors)
        largest = max(largest, made.numel())
        return made

    monkeypatch.setattr(torch, "stack", watched)
    for one, other in zip(whole, [rules.gram(updates), rules.median(updates), rules.bulyan(updates, 1)], strict=True):
        torch.testing.assert_close(one, other)
    assert largest == 7 * 64


def test_records_are_used_up_so_that_each_update_is_held_once() -> None:
    shown = replies_of(honest(5))
    strategy_of("rfa").aggregate_train(1, shown)
    assert not any(one.content.array_records[ARRAYS] for one in shown)


def test_it_asks_as_fedavg_and_takes_the_adapter_of_the_round() -> None:
    class Grid:
        def get_node_ids(self) -> list[int]:
            return [1, 2, 3]

    strategy = build_inner(StrategySettings("rfa"))
    arrays: ArrayRecord = to_record(dict(CURRENT))
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), Grid()))  # type: ignore[arg-type]
    assert len(messages) == 3
    assert step_of(strategy, honest(3)).norm() > 0
