"""Local LoRA fine-tuning: adapter + windows -> update.

Two kinds of update. ``gradient``: plain SGD on clipped gradients, so that the update is their sum and the adaptive
optimizer runs on the server (Reddi et al. 2021). ``delta``: AdamW here, averaging on the server (the paper, section
3.2). Knows a model and token ids; must not know clients, rounds or codecs.
Shapes: W windows, T tokens a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from adapters.model import Adapter, get_adapter, set_adapter, subtract
from adapters.settings import TrainSettings, num_steps
from adapters.team import Team

IGNORED = -100
"""The label of a token that does not count; ``cross_entropy`` leaves it out."""


class DivergedError(ValueError):
    """Training left the numbers that a float holds: the loss is NaN or infinite, and no later step can mend it."""


@dataclass(frozen=True)
class Windows:
    """What is trained and evaluated on: token ids, and which of them count in the loss.

    A window is padded behind its last token, so a causal model never sees the padding from a token that counts, and no
    attention mask is needed.
    """

    ids: Tensor  # [W, T] int64
    counted: Tensor  # [W, T] bool; the first token of a window is never predicted and never counts

    @classmethod
    def whole(cls, ids: Tensor) -> Windows:
        """Windows of ``[W, T]`` ids in which every token counts."""
        return cls(ids, torch.ones_like(ids, dtype=torch.bool))

    @classmethod
    def cat(cls, parts: Sequence[Windows]) -> Windows:
        return cls(torch.cat([part.ids for part in parts]), torch.cat([part.counted for part in parts]))

    @property
    def labels(self) -> Tensor:
        """``[W, T]`` int64: the id where a token counts, else ``IGNORED``."""
        return self.ids.where(self.counted, IGNORED)

    @property
    def num_counted(self) -> int:
        return int(self.counted[:, 1:].sum())

    def trimmed(self) -> Windows:
        """Without the columns behind the last token that counts: what follows a token does not change its loss."""
        length = int(self.counted.any(0).nonzero().max()) + 1
        return Windows(self.ids[:, :length], self.counted[:, :length])

    def split(self, size: int) -> Iterator[Windows]:
        for ids, counted in zip(self.ids.split(size), self.counted.split(size), strict=True):
            yield Windows(ids, counted)

    def to(self, device: torch.device) -> Windows:
        return Windows(self.ids.to(device), self.counted.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Windows:
        return Windows(self.ids[rows], self.counted[rows])

    def __len__(self) -> int:
        return len(self.ids)


def finetune(
    model: PeftModel,
    adapter: Mapping[str, Tensor],
    windows: Windows,
    settings: TrainSettings,
    seed: int,
    on_step: Callable[[int], None] | None = None,
    team: Team = Team(),  # noqa: B008 (frozen)
) -> tuple[Adapter, float]:
    """Trains the adapter on random batches of windows.

    The gradient of a step is that of the mean over all tokens of its batch that count, whatever the micro-batch size.

    Args:
        model: base model with any adapter of the same shape in it; left in an undefined state.
        adapter: where training starts.
        windows: at least one, and in each at least one token that counts.
        settings: steps or epochs, batches, learning rate and its schedule.
        seed: of batches and dropout; the same seed, data and thread count give the same update to the bit.
        on_step: called after each step with the steps done; may evaluate the model.
        team: processes that do this together, all with the same arguments; all get the same update, which is that of
            one process but for the order of float sums (and for dropout, which every process draws on its own).

    Returns:
        The update (new adapter minus ``adapter``), float32 on the model's device, and the mean training loss in nats
        per token.

    Raises:
        DivergedError: the loss of a step is not finite; the model holds an adapter that is of no use.
    """
    assert len(windows) > 0, "empty client data is refused before training starts"
    set_adapter(model, adapter)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, settings)
    steps = num_steps(settings, len(windows))
    device = parameters[0].device
    total_loss = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed + team.rank)
        for step, picked in enumerate(_batches(len(windows), settings, seed)):
            model.train()
            batch, step_loss = windows[picked], 0.0
            for micro_batch in team.share(list(batch.split(settings.micro_batch_size))):
                share = micro_batch.num_counted / batch.num_counted
                loss = next_token_loss(model, micro_batch.trimmed().to(device)) * share
                loss.backward()
                step_loss += float(loss.detach())
            step_loss = team.add_up(parameters, step_loss)
            if not math.isfinite(step_loss):
                raise DivergedError(f"training diverged: the loss is {step_loss} in step {step + 1}: lower train.lr")
            total_loss += step_loss
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(settings, step, steps)
            optimizer.step()
            optimizer.zero_grad()
            if on_step is not None:
                on_step(step + 1)
    return subtract(get_adapter(model), adapter), total_loss / steps


def next_token_loss(model: torch.nn.Module, windows: Windows) -> Tensor:
    """Mean cross-entropy of the tokens that count, each given those before it, in nats per token.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        windows: on the model's device, with at least one token that counts.
    """
    logits = model(input_ids=windows.ids, use_cache=False).logits  # no cache: it would copy every key and value
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), windows.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


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
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _schedule(settings: TrainSettings, step: int, steps: int) -> float:
    """The share of ``train.lr`` that a step takes, step counted from 0: what ``get_constant_schedule_with_warmup`` and
    ``get_cosine_schedule_with_warmup`` of transformers give, so that the first step of a warm-up takes none."""
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    if settings.schedule == "constant":
        return 1.0
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
