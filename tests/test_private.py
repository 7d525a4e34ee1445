"""DP-SGD on an adapter: what it bounds, and the noise that it really adds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from scipy import stats
from torch import Tensor

from adapters.finetune import trained_parameters
from adapters.model import get_adapter, load_model
from adapters.private import Protection, _gradients_by_window, finetune_privately
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, sampling_rate
from adapters.windows import Windows, next_token_loss, window_losses

SETTINGS = TrainSettings(update="gradient", steps=1, batch_size=4, micro_batch_size=2, lr=1.0, clip=1e9)


@pytest.fixture(scope="module", params=["none", "nf4"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    model = load_model(ModelSettings(path="assets/tiny-llama", quantization=request.param), LoraSettings(rank=4), 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained_parameters(model):  # with B at 0 no gradient reaches A
        parameter.data.normal_(std=0.05, generator=generator)
    return model


def windows(count: int = 6) -> Windows:
    generator = torch.Generator().manual_seed(1)
    counted = torch.rand(count, 24, generator=generator) < 0.7
    counted[:, -1] = True
    return Windows(torch.randint(5, 200, (count, 24), generator=generator), counted)


def protection(seed: int = 0, noise: float = 0.0, clip: float = 1.0) -> Protection:
    generator = torch.Generator().manual_seed(seed)
    return Protection(
        clip,
        noise,
        lambda count: torch.rand(count, dtype=torch.float64, generator=generator),
        lambda shape: torch.randn(shape, generator=generator),
    )


@pytest.mark.parametrize("one_by_one", [False, True])
def test_gradients_by_window_are_those_of_windows_alone(model: PeftModel, one_by_one: bool) -> None:
    data = windows(1 if one_by_one else 4)
    losses, gradients = _gradients_by_window(model, data, one_by_one)
    for row in range(len(data)):
        loss = next_token_loss(model, data[row : row + 1])
        alone = torch.autograd.grad(loss, trained_parameters(model))
        assert losses[row] == pytest.approx(float(loss), rel=1e-4)
        for ours, theirs in zip(gradients, alone, strict=True):
            # over four bits some CPUs multiply in bfloat16, in another order for another number of windows
            atol = 0.05 * float(theirs.abs().max()) if hasattr(model, "is_quantized") else 1e-6
            torch.testing.assert_close(ours[row], theirs, rtol=1e-4, atol=atol)
    assert all(parameter.grad is None for parameter in trained_parameters(model))


def test_window_losses_have_the_mean_of_equal_windows() -> None:
    model = load_model(ModelSettings(path="assets/tiny-llama"), LoraSettings(rank=4), 0)
    data = Windows.whole(windows().ids)
    assert float(window_losses(model, data).mean()) == pytest.approx(float(next_token_loss(model, data)), rel=1e-6)


def update_of(model: PeftModel, data: Windows, hidden: Protection, settings: TrainSettings = SETTINGS) -> Tensor:
    start = get_adapter(model)
    update, _ = finetune_privately(model, {k: v.clone() for k, v in start.items()}, data, settings, hidden, 0)
    from adapters.model import set_adapter

    set_adapter(model, start)
    return torch.cat([tensor.flatten() for tensor in update.values()])


def test_no_window_moves_the_sum_by_more_than_clip(model: PeftModel) -> None:
    """Zero-out neighbours: the same draws, one window's gradient left out."""
    data, clip = windows(), 0.05
    for row in range(len(data)):
        everything = Protection(clip, 0.0, lambda count: torch.zeros(count, dtype=torch.float64), torch.zeros)

        def without(count: int, row: int = row) -> Tensor:
            return torch.zeros(count, dtype=torch.float64).index_fill(0, torch.tensor(row), 1.0)

        difference = update_of(model, data, everything) - update_of(model, data, replace(everything, uniforms=without))
        moved = float(difference.norm()) * SETTINGS.batch_size / SETTINGS.lr
        assert 0.5 * clip < moved < 1.001 * clip  # the gradients are longer than clip, so that it is reached


def test_the_noise_has_its_stated_variance_and_no_memory(model: PeftModel) -> None:
    """At 99.9 % confidence, over all values of an adapter and two trainings."""
    clip, noise = 1e-3, 50.0
    nothing = Protection(clip, noise, lambda count: torch.ones(count, dtype=torch.float64), protection(3).normals)
    first, second = (update_of(model, windows(), nothing) for _ in range(2))
    deviation = SETTINGS.lr * clip * noise / SETTINGS.batch_size
    for drawn in (first, second):
        squares = float((drawn / deviation).square().sum())
        low, high = stats.chi2.interval(0.999, len(drawn))
        assert low < squares < high
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < stats.norm.ppf(0.9995) / len(first) ** 0.5


def test_batches_are_drawn_window_by_window() -> None:
    """The number of windows in a step is binomial, and a step without any is a step of noise alone."""
    assert sampling_rate(SETTINGS, 40) == 0.1
    assert sampling_rate(SETTINGS, 2) == 1.0
    hidden = protection(5)
    counts = [int((hidden.uniforms(40) < 0.1).sum()) for _ in range(2000)]
    assert abs(sum(counts) / 2000 - 4) < 4 * (3.6 / 2000) ** 0.5


def test_a_window_without_a_finite_gradient_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import adapters.private as private

    model = load_model(ModelSettings(path="assets/tiny-llama"), LoraSettings(rank=4), 0)
    true = private._gradients_by_window

    def broken(*args: object) -> tuple[Tensor, list[Tensor]]:
        losses, gradients = true(*args)  # type: ignore[arg-type]
        for gradient in gradients:
            gradient[0] = torch.inf
        return losses, gradients

    monkeypatch.setattr(private, "_gradients_by_window", broken)
    everything = Protection(1.0, 0.0, lambda count: torch.zeros(count, dtype=torch.float64), torch.zeros)
    assert bool(update_of(model, windows(2), everything).isfinite().all())
