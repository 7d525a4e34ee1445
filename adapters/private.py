"""DP-SGD on an adapter (Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1).

Every window is drawn into a step by itself with probability ``batch_size / W`` (Poisson, which the accounts hold for; a
batch may be empty); its gradient is clipped to ``clip``; noise goes into the sum, which is divided by ``batch_size``,
not by how many were drawn. What follows - optimizer, coding, averaging - sees nothing else of the windows. The twin
without noise is ``finetune.py``.

Gradients by window are Opacus's (Yousefpour et al. 2021), from the inputs and output gradients of the adapter's linear
layers: the base weights may be quantised. Shapes: W windows, M of a pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from adapters.finetune import descend, trained_parameters, trained_parts
from adapters.model import Adapter, get_adapter, set_adapter, subtract
from adapters.settings import TrainSettings, num_steps, sampling_rate
from adapters.team import Team
from adapters.windows import Windows, window_losses


@dataclass(frozen=True)
class Protection:
    """What hides a window. Whoever knows the randomness sees through it: it must come from nothing that others know."""

    clip: float  # largest L2 norm of a window's gradient, over all of the adapter's tensors
    noise_multiplier: float  # standard deviation of the noise in the sum, over ``clip``
    uniforms: Callable[[int], Tensor]  # so many numbers in (0, 1], the same on every process of a team
    normals: Callable[[torch.Size], Tensor]  # standard normals of a shape, float32; asked for by the first of a team
    one_by_one: bool = False  # a pass for every window: where layers run twice or are compiled, hooks see no windows
    trained_rank: int | None = None  # rows of every factor that are trained; the bound and the noise are of all


def finetune_privately(
    model: PeftModel,
    adapter: Mapping[str, Tensor],
    windows: Windows,
    settings: TrainSettings,
    protection: Protection,
    seed: int,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> tuple[Adapter, float]:
    """As ``finetune.finetune``, but that what comes of it is private: ``num_steps`` Gaussian mechanisms in a row.

    Args:
        model: base model with any adapter of the same shape in it; left in an undefined state.
        adapter: where training starts.
        windows: at least one, and in each at least one token that counts.
        settings: ``batch_size`` windows are expected in a step.
        protection: bound, noise and randomness.
        seed: of dropout.
        team: processes that do this together, all with the same arguments.

    Returns:
        The update (new adapter minus ``adapter``), float32 on the model's device, and the mean training loss of what
        was drawn, in nats per token, which is NOT private.

    Raises:
        DivergedError: the loss of a step is not finite.
    """
    set_adapter(model, adapter)
    gradients = _private_gradients(model, windows, settings, protection, team)
    trained = trained_parts(model, protection.trained_rank)
    loss = descend(trained, gradients, settings, num_steps(settings, len(windows)), seed + team.rank)
    return subtract(get_adapter(model), adapter), loss


def _private_gradients(
    model: PeftModel, windows: Windows, settings: TrainSettings, protection: Protection, team: Team
) -> Iterator[float]:
    parameters = trained_parameters(model)
    rate = sampling_rate(settings, len(windows))
    for _ in range(num_steps(settings, len(windows))):
        model.train()
        picked = (protection.uniforms(len(windows)) <= rate).nonzero().flatten()
        sums, loss = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters], 0.0
        size = 1 if protection.one_by_one else settings.micro_batch_size
        for micro_batch in team.share(list(windows[picked].split(size)) if len(picked) else []):
            loss += _add_clipped(model, micro_batch.trimmed(), sums, protection)
        for parameter, total in zip(parameters, sums, strict=True):
            if team.rank == 0:
                noise = protection.normals(total.shape).to(total)
                total.add_(noise, alpha=protection.clip * protection.noise_multiplier)
            parameter.grad = total.div_(settings.batch_size).to(parameter.dtype)
        yield team.add_up(parameters, loss / max(1, len(picked)))


def _add_clipped(model: PeftModel, windows: Windows, sums: list[Tensor], protection: Protection) -> float:
    """Adds every window's clipped gradient to the sums; gives the sum of the losses."""
    parameters = trained_parameters(model)
    losses, gradients = _gradients_by_window(model, windows.to(parameters[0].device), protection.one_by_one)
    squares_M = sum(gradient.float().flatten(1).square().sum(1) for gradient in gradients)
    assert isinstance(squares_M, Tensor)
    # a gradient that is not finite has no direction to keep: it counts as none, which is a bound as well
    scale_M = (protection.clip / squares_M.sqrt().clamp_min(1e-12)).clamp_max(1.0)
    usable_M = squares_M.isfinite()
    for total, gradient in zip(sums, gradients, strict=True):
        kept = gradient.float()[usable_M]
        total.add_(torch.tensordot(scale_M[usable_M], kept, dims=1))
    return float(losses[losses.isfinite()].sum())


def _gradients_by_window(model: PeftModel, windows: Windows, one_by_one: bool) -> tuple[Tensor, list[Tensor]]:
    """Losses ``[M]``, and every parameter's gradients ``[M, ...]``; the parameters' own are left empty."""
    parameters = trained_parameters(model)
    if one_by_one:
        losses = window_losses(model, windows)
        losses.sum().backward()
        found = [None if parameter.grad is None else parameter.grad[None] for parameter in parameters]
    else:
        with _hooked(model):
            losses = window_losses(model, windows)
            losses.sum().backward()
            found = [getattr(parameter, "grad_sample", None) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    gradients = [  # what no window passed, such as an expert, has none
        parameter.new_zeros(len(losses), *parameter.shape) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]
    return losses.detach(), gradients


@contextmanager
def _hooked(model: PeftModel) -> Iterator[None]:
    """The model's parameters get ``grad_sample`` in a backward pass, and lose it again."""
    from opacus import GradSampleModule  # takes half a second to load, and most trainers never need it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on layers whose inputs need no gradient
        hooked = GradSampleModule(model, strict=False, loss_reduction="sum")
        try:
            yield
        finally:
            hooked.to_standard_module()
