"""Training from round to round: learning rates, the proximal term, which adapter is kept, and when a run has enough."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.serverapp.strategy import FedProx
from peft import PeftModel
from safetensors.torch import load_file
from test_federation import run, settings_for
from test_private import protection

from adapters.finetune import finetune, trained_parameters
from adapters.model import get_adapter, load_model, set_adapter
from adapters.private import finetune_privately
from adapters.settings import (
    LoraSettings,
    ModelSettings,
    TrainSettings,
    check_training,
    for_round,
    round_factor,
)
from adapters.windows import Windows, next_token_loss
from conf.checks import check_settings
from server.federate import resumed
from server.plan import rates
from server.run import best as rules
from server.run.centralised import run_alone
from server.run.checkpoint import load_checkpoint
from server.run.evaluate import Evaluator
from server.run.federation import prepare
from strategies.build import proximal_mu_of
from strategies.mean import MeanStrategy

TRAINING = TrainSettings(update="gradient", steps=3, batch_size=4, micro_batch_size=4, lr=0.5, clip=1e9)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    model = load_model(ModelSettings(), LoraSettings(rank=2, target_modules=["q_proj"]), seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model):  # with B at 0 no gradient reaches A
        parameter.data.normal_(std=0.05, generator=generator)
    return model


@pytest.fixture(scope="module")
def windows() -> Windows:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (4, 16), generator=generator)
    return Windows(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ({}, [1, 1, 1, 1]),
        ({"round_warmup": 1}, [1 / 2, 1, 1, 1]),
        ({"round_schedule": "linear"}, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"round_schedule": "linear", "round_warmup": 2}, [1 / 3, 2 / 3, 1, 1 / 2]),
        ({"round_schedule": "linear", "round_floor": 0.2}, [1, 0.8, 0.6, 0.4]),
        ({"round_schedule": "cosine"}, [1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)]),
        ({"round_schedule": "cosine", "round_floor": 0.5, "round_warmup": 2}, [1 / 3, 2 / 3, 1, 0.75]),
    ],
)
def test_a_rounds_share_of_the_learning_rate_is_the_formulas(how: dict[str, object], wanted: list[float]) -> None:
    training = dataclasses.replace(TRAINING, **how)  # type: ignore[arg-type]
    check_training(training)
    assert [round_factor(training, number, 4) for number in (1, 2, 3, 4)] == pytest.approx(wanted)
    assert for_round(training, 2, 4).lr == pytest.approx(0.5 * wanted[1])


def test_the_dry_run_says_where_the_rate_begins_and_ends(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run")
    assert rates(settings) == "lr 0.005"
    settings.train.round_schedule, settings.train.round_warmup, settings.federation.rounds = "linear", 1, 5
    assert rates(settings) == "lr 0.005 at most (0.0025 in round 1, 0.00125 in the last)"


def test_more_rounds_follow_the_longer_curve() -> None:
    training = dataclasses.replace(TRAINING, round_schedule="linear")
    assert [round_factor(training, number, 8) for number in (3, 4, 5, 8)] == [6 / 8, 5 / 8, 4 / 8, 1 / 8]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train__round_schedule": "sine"}, r"train\.round_schedule='sine' is none of constant, linear, cosine"),
        ({"train__round_warmup": -1}, r"train\.round_warmup=-1 must be at least 0"),
        ({"train__round_warmup": 3}, r"train\.round_warmup=3 must be less than federation\.rounds=3"),
        ({"train__round_floor": 1.5}, r"train\.round_floor=1\.5 is a share"),
        ({"train__round_floor": 0.1}, r"train\.round_floor=0\.1 needs train\.round_schedule"),
        ({"train__round_warmup": 1, "strategy__name": "fedadam"}, r"do not go with strategy=fedadam"),
        ({"train__proximal_mu": -1.0}, r"train\.proximal_mu=-1\.0 must be a number, at least 0"),
        ({"train__proximal_mu": 1.0, "train__steps": 1}, r"train\.proximal_mu=1\.0 needs train\.steps of at least 2"),
        (
            {"train__proximal_mu": 2.0, "train__update": "gradient", "train__lr": 1.0},
            r"train\.proximal_mu=2\.0 times train\.lr=1\.0 must be less than 2",
        ),
        ({"federation__patience": 0}, r"federation\.patience=0 must be at least 1, or null"),
        ({"federation__min_improvement": 0.1}, r"federation\.min_improvement=0\.1 needs federation\.patience=N"),
        ({"federation__patience": 1, "federation__min_improvement": -0.1}, r"min_improvement=-0\.1 must be at least 0"),
    ],
)
def test_what_cannot_be_served_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_settings(settings_for(tmp_path, "run", arm="dense", **change))


def test_clients_train_with_their_rounds_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    plain = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW) -> None:
        taken.append(self.param_groups[0]["lr"])
        plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    changes: dict[str, object] = {"train__round_schedule": "linear", "train__steps": 1}
    run(settings_for(tmp_path, "dense", arm="dense", **changes), tmp_path)
    wanted = [0.005, 0.005, 0.01 / 3, 0.01 / 3, 0.005 / 3, 0.005 / 3]  # three rounds, two clients in each
    assert taken == pytest.approx(wanted)
    taken.clear()
    alone = settings_for(tmp_path, "alone", arm="centralised", **changes)
    run_alone(alone)  # as many steps a round as the round's clients take together
    assert taken == pytest.approx(wanted)


def by_hand(
    model: PeftModel, windows: Windows, mu: float, noise: Mapping[int, list[torch.Tensor]]
) -> list[torch.Tensor]:
    """SGD on the loss of all windows plus the term, as autograd has it; ``noise`` is added to a step's gradient."""
    parameters = trained_parameters(model)
    start = [parameter.detach().clone() for parameter in parameters]
    for step in range(TRAINING.steps):
        loss = next_token_loss(model, windows)
        for parameter, origin in zip(parameters, start, strict=True):
            loss = loss + mu / 2 * (parameter - origin).square().sum()
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                parameter.sub_(TRAINING.lr * (gradient + (noise[step][number] if noise else 0.0)))
    return [parameter.detach() - origin for parameter, origin in zip(parameters, start, strict=True)]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_proximal_term_is_autograds_whatever_the_passes(
    model: PeftModel, windows: Windows, micro_batch_size: int
) -> None:
    start = get_adapter(model)
    training = dataclasses.replace(TRAINING, proximal_mu=0.8, micro_batch_size=micro_batch_size, steps=1, epochs=3)
    found, _ = finetune(model, start, windows, training, seed=0)  # an epoch is a step here, of all windows
    set_adapter(model, start)
    wanted = by_hand(model, windows, 0.8, {})
    set_adapter(model, start)
    without = by_hand(model, windows, 0.0, {})
    set_adapter(model, start)
    for ours, theirs in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    assert sum(float((a - b).abs().max()) for a, b in zip(wanted, without, strict=True)) > 1e-2
    assert sum(float(one.norm()) for one in wanted) < sum(float(one.norm()) for one in without)


def test_dp_sgd_adds_the_term_to_what_is_noised(model: PeftModel, windows: Windows) -> None:
    start = get_adapter(model)
    training = dataclasses.replace(TRAINING, proximal_mu=0.8)
    hidden = protection(seed=3, noise=1e-4, clip=100.0)  # no window's gradient is as long
    everybody = dataclasses.replace(hidden, uniforms=lambda count: torch.zeros(count))
    found, _ = finetune_privately(model, start, windows, training, everybody, seed=0)
    generator = torch.Generator().manual_seed(3)
    shapes = [parameter.shape for parameter in trained_parameters(model)]
    noise = {
        step: [0.01 * torch.randn(shape, generator=generator) / training.batch_size for shape in shapes]
        for step in range(training.steps)
    }
    set_adapter(model, start)
    wanted = by_hand(model, windows, 0.8, noise)
    set_adapter(model, start)
    for ours, theirs in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def test_a_strategy_with_a_term_of_its_own_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert proximal_mu_of(MeanStrategy(FedProx(proximal_mu=0.3))) == 0.3
    monkeypatch.setattr(
        "server.run.federation.build_inner", lambda settings, root: MeanStrategy(FedProx(proximal_mu=0.3))
    )
    settings = settings_for(tmp_path, "run", arm="dense", train__proximal_mu=0.5)
    with pytest.raises(ValueError, match=r"a proximal term of 0\.3, .* give train\.proximal_mu=0\.3"):
        prepare(SimpleNamespace(), settings, SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "least", "wanted"),
    [
        ([3.0], 0.0, 0),
        ([3.0, 3.0], 0.0, 1),
        ([3.0, 2.9, 2.8], 0.0, 0),
        ([3.0, 2.9, 2.95, 2.9], 0.0, 2),
        ([3.0, 2.9, 2.85, 2.75], 0.1, 0),  # 0.15 below the last that counted
        ([3.0, 2.875, 2.8, 2.8], 0.125, 2),
        ([3.0, 3.5, 3.4], 0.0, 2),
    ],
)
def test_rounds_in_vain_are_counted_from_the_last_improvement(losses: list[float], least: float, wanted: int) -> None:
    assert rules.rounds_in_vain(dict(enumerate(losses)), least) == wanted
    assert rules.enough(dict(enumerate(losses)), None, least) is None
    assert (rules.enough(dict(enumerate(losses)), 2, least) is not None) == (wanted >= 2)


def test_the_best_round_is_the_first_of_the_lowest() -> None:
    assert rules.best_round({0: 3.0, 2: 2.5, 4: 2.7, 6: 2.5}) == 2
    assert rules.best_round({0: 3.0, 1: 3.5}) == 0


class Losses:
    """The evaluator's, replaced by these in order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
        left = list(losses)
        monkeypatch.setattr(Evaluator, "loss", lambda evaluator, adapter: left.pop(0))


FEW: dict[str, object] = {"arm": "dense", "train__steps": 1, "federation__rounds": 5}


def adapters_by_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Of a run without any of this: the loss does not change what is trained."""
    seen: list[dict[str, torch.Tensor]] = []
    with monkeypatch.context() as patch:

        def keep(evaluator: Evaluator, adapter: Mapping[str, torch.Tensor]) -> float:
            seen.append(dict(adapter))
            return 3.0

        patch.setattr(Evaluator, "loss", keep)
        run(settings_for(folder, "plain", **FEW), folder)
    return dict(enumerate(seen))


def test_the_best_adapter_is_kept_over_a_cut_and_patience_ends_the_run_at_its_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = adapters_by_round(tmp_path, monkeypatch)
    changes = FEW | {"federation__keep_best": True, "federation__patience": 2}
    Losses(monkeypatch, [3.0, 2.5, 2.7, 2.6, 1.0, 1.0])
    whole = run(settings_for(tmp_path, "whole", **changes), tmp_path)
    assert (whole.heldout_loss, whole.adapter_round, whole.final_loss) == ([3.0, 2.5, 2.7, 2.6], 1, 2.5)
    assert whole.ended_early.startswith("after round 3 of 5: the held-out loss did not improve in 2 rounds")

    Losses(monkeypatch, [3.0, 2.5])  # then the list is at its end: the run is cut within round 3
    cut = settings_for(tmp_path, "cut", **changes)
    with pytest.raises(IndexError):
        run(cut, tmp_path)
    assert load_checkpoint(tmp_path / "cut").server_round == 2
    Losses(monkeypatch, [2.7, 2.6])
    again = run(resumed(tmp_path / "cut", []), tmp_path)
    assert (again.heldout_loss, again.adapter_round) == (whole.heldout_loss, 1)
    assert again.ended_early == whole.ended_early
    for name in ("whole", "cut"):
        exported = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        assert all(torch.equal(tensor, adapters[1][key]) for key, tensor in exported.items())
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert (results["adapter_round"], results["ended_early"]) == (1, whole.ended_early)
        card = (tmp_path / name / "adapter" / "README.md").read_text()
        assert "| kept | the adapter of round 1 of 3, which had the lowest loss |" in card
        assert "3.0000 -> 2.5000" in card and "| ended early | after round 3 of 5" in card

    with pytest.raises(ValueError, match=r"federation\.keep_best=false cannot be changed"):
        resumed(tmp_path / "cut", ["federation.keep_best=false"])
    Losses(monkeypatch, [2.6, 2.4, 2.45])
    longer = run(resumed(tmp_path / "cut", ["federation.patience=null"]), tmp_path)
    assert (len(longer.heldout_loss), longer.adapter_round, longer.ended_early) == (6, 4, "")
    exported = load_file(tmp_path / "cut" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, adapters[4][key]) for key, tensor in exported.items())


def test_a_run_that_diverges_keeps_its_best_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Losses(monkeypatch, [3.0, 2.5, 2.7, math.nan])
    with pytest.raises(ValueError, match=r"after round 3 is nan.* The adapter of round 1 is in"):
        run(settings_for(tmp_path, "run", **FEW, federation__keep_best=True), tmp_path)


def test_by_default_the_last_adapter_is_the_final_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapters_by_round(tmp_path, monkeypatch)
    Losses(monkeypatch, [3.0, 2.5, 2.7, 2.6, 2.6, 2.6])
    plain = run(settings_for(tmp_path, "run", **FEW), tmp_path)
    assert (plain.adapter_round, plain.final_loss, plain.ended_early) == (None, 2.6, "")
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, adapters[5][key]) for key, tensor in exported.items())
    assert load_checkpoint(tmp_path / "run").best is None


def test_pooled_training_has_enough_by_the_same_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [2.5, 2.7, 2.6]
    monkeypatch.setattr(Evaluator, "loss", lambda evaluator, adapter: 3.0)
    monkeypatch.setattr(Evaluator, "loss_as_it_is", lambda evaluator: left.pop(0))
    changes = FEW | {"federation__keep_best": True, "federation__patience": 2, "arm": "centralised"}
    pooled = run_alone(settings_for(tmp_path, "pooled", **changes))
    assert (pooled.heldout_loss, pooled.adapter_round) == ([3.0, 2.5, 2.7, 2.6], 1)
    assert pooled.ended_early.startswith("after round 3 of 5: the held-out loss did not improve in 2 rounds")
