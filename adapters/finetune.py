"""Local LoRA fine-tuning: adapter + windows -> update.

Two kinds of update. ``gradient``: plain SGD on clipped gradients, so that the update is their sum and the adaptive
optimizer runs on the server (Reddi et al. 2021). ``delta``: AdamW here, averaging on the server (the paper, section
3.2). Knows a model and token ids; must not know clients, rounds or codecs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn

from adapters.model import Adapter, get_adapter, set_adapter, subtract
from adapters.settings import TrainSettings, num_steps
from adapters.team import Team
from adapters.windows import Windows, next_token_loss


class DivergedError(ValueError):
    """Training left the numbers that a float holds: the loss is NaN or infinite, and no later step can mend it."""


def finetune(
    model: PeftModel,
    adapter: Mapping[str, Tensor],
    windows: Windows,
    settings: TrainSettings,
    seed: int,
    team: Team = Team(),  # noqa: B008 (frozen)
    trained_rank: int | None = None,
) -> tuple[Adapter, float]:
    """Trains the adapter on random batches of windows.

    The gradient of a step is that of the mean over all tokens of its batch that count, whatever the micro-batch size.

    Args:
        model: base model with any adapter of the same shape in it; left in an undefined state.
        adapter: where training starts.
        windows: at least one, and in each at least one token that counts.
        settings: steps or epochs, batches, learning rate and its schedule.
        seed: of batches and dropout; the same seed, data and thread count give the same update to the bit.
        team: processes that do this together, all with the same arguments; all get the same update, which is that of
            one process but for the order of float sums (and for dropout, which every process draws on its own).
        trained_rank: of every factor the first so many rows of A and columns of B are trained; the others take part in
            every pass as they are. None: all are trained.

    Returns:
        The update (new adapter minus ``adapter``), float32 on the model's device, and the mean training loss in nats
        per token.

    Raises:
        DivergedError: the loss of a step is not finite; the model holds an adapter that is of no use.
    """
    assert len(windows) > 0, "empty client data is refused before training starts"
    set_adapter(model, adapter)
    gradients = mean_gradients(model, windows, settings, seed, team)
    trained = trained_parts(model, trained_rank)
    loss = descend(trained, gradients, settings, num_steps(settings, len(windows)), seed + team.rank)
    return subtract(get_adapter(model), adapter), loss


def trained_parameters(model: PeftModel) -> list[torch.nn.Parameter]:
    """The adapter's, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class TrainedPart:
    """What an optimizer is given of one of the model's parameters: all of it, or the rows of a rank. Of the others it
    keeps no state."""

    parameter: nn.Parameter
    part: nn.Parameter  # the same one, or another on a part of its memory
    cut: Callable[[Tensor], Tensor]

    def take_gradient(self) -> None:
        """From the parameter, where the backward pass left it."""
        if self.part is not self.parameter and self.parameter.grad is not None:
            self.part.grad = self.cut(self.parameter.grad)
            self.parameter.grad = None


def trained_parts(model: PeftModel, rank: int | None = None) -> list[TrainedPart]:
    """Of the adapter's parameters, in the model's order; with a rank the first so many rows of A and columns of B."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            cut = partial(_of_rank, name, rank)
            part = cut(parameter.detach())
            is_whole = part.shape == parameter.shape
            found.append(TrainedPart(parameter, parameter if is_whole else nn.Parameter(part), cut))
    return found


def _of_rank(name: str, rank: int | None, tensor: Tensor) -> Tensor:
    return tensor[:rank] if ".lora_A." in name else tensor[:, :rank] if ".lora_B." in name else tensor


def descend(
    trained: Sequence[TrainedPart],
    gradients: Iterable[float],
    settings: TrainSettings,
    steps: int,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> float:
    """Takes a step for every loss that comes, along the gradient that came with it, and gives the mean of the losses.

    Args:
        trained: where training goes on.
        gradients: gives a step's loss once the step's gradient lies in the parameters; ``steps`` of them.
        settings: optimizer, learning rate, schedule, bound of a gradient, and how strongly each step is pulled towards
            where the first began (``proximal_mu``).
        steps: over which the schedule runs.
        seed: of dropout.
        on_step: called after each step with the steps done; may evaluate the model.
        factor: of the learning rate of a step, counted from 0, beside the schedule.

    Raises:
        DivergedError: a loss is not finite.
    """
    parameters = [one.part for one in trained]
    optimizer = _optimizer(parameters, settings)
    device = parameters[0].device
    start = [parameter.detach().clone() for parameter in parameters] if settings.proximal_mu else []
    total_loss = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for step, loss in enumerate(gradients):
            if not math.isfinite(loss):
                raise DivergedError(f"training diverged: the loss is {loss} in step {step + 1}: lower train.lr")
            total_loss += loss
            for one in trained:
                one.take_gradient()
            _pull(parameters, start, settings.proximal_mu)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(settings, step, steps) * factor(step)
            optimizer.step()
            optimizer.zero_grad()
            if on_step is not None:
                on_step(step + 1)
    return total_loss / steps


def _pull(parameters: list[torch.nn.Parameter], start: list[Tensor], mu: float) -> None:
    """Adds the gradient of ``mu / 2`` times the squared distance from ``start`` (Li et al. 2020, "Federated
    Optimization in Heterogeneous Networks", section 3.2): once a step, to the gradient that is whole, whatever passes
    and processes it came from. It knows no window, so that it takes nothing from a gradient's privacy."""
    for parameter, origin in zip(parameters, start, strict=False):  # without the term there is no start
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def mean_gradients(
    model: PeftModel,
    windows: Windows,
    settings: TrainSettings,
    seed: int,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> Iterator[float]:
    """Of the mean over all tokens of a batch that count, step by step; gives that mean."""
    parameters = trained_parameters(model)
    device = parameters[0].device
    for picked in _batches(len(windows), settings, seed):
        model.train()
        batch, loss = windows[picked], 0.0
        for micro_batch in team.share(list(batch.split(settings.micro_batch_size))):
            share = micro_batch.num_counted / batch.num_counted
            part = next_token_loss(model, micro_batch.trimmed().to(device)) * share
            part.backward()
            loss += float(part.detach())
        yield team.add_up(parameters, loss)


def _batches(num_windows: int, settings: TrainSettings, seed: int) -> Iterator[Tensor]:
    """The windows of every step; on the CPU, so that they are the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    if settings.epochs is None:
        for _ in range(settings.steps):
            yield torch.randint(num_windows, (settings.batch_size,), generator=generator)
    else:
        for _ in range(settings.epochs):
            yield from torch.randperm(num_windows, generator=generator).split(settings.batch_size)


def _optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.update == "gradient":
        return torch.optim.SGD(parameters, lr=settings.lr)
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]  # for which zero is no rest
    groups = [{"params": matrices}] + ([{"params": vectors, "weight_decay": 0.0}] if vectors else [])
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)


def _schedule(settings: TrainSettings, step: int, steps: int) -> float:
    """The share of ``train.lr`` that a step takes, step counted from 0: what ``get_constant_schedule_with_warmup`` and
    ``get_cosine_schedule_with_warmup`` of transformers give, so that the first step of a warm-up takes none."""
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    if settings.schedule == "constant":
        return 1.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
