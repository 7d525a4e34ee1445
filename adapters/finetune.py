"""Local LoRA fine-tuning: adapter + windows -> update.

Two kinds of update. ``gradient``: plain SGD on clipped gradients, so that the update is their sum and the adaptive
optimizer runs on the server (Reddi et al. 2021). ``delta``: AdamW here, averaging on the server (the paper, section
3.2). Knows a model and token ids; must not know clients, rounds or codecs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from adapters.model import Adapter, get_adapter, set_adapter, subtract


@dataclass
class TrainSettings:
    """One client's local training in one round."""

    update: str = "gradient"  # gradient (SGD here, adaptive on the server) | delta (AdamW here, mean on the server)
    steps: int = 10
    batch_size: int = 8  # windows a step
    micro_batch_size: int = 8  # windows a pass; smaller needs less memory and gives the same gradients
    lr: float = 1.0
    schedule: str = "constant"  # constant | cosine (to 0 over the steps of a round)
    warmup_steps: int = 0
    weight_decay: float = 0.0  # delta only
    clip: float = 1.0  # maximal norm of a step's gradient
    threads: int = 1  # CPU threads a client; results are reproducible only for an equal number


def check_training(settings: TrainSettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if settings.update not in ("gradient", "delta"):
        raise ValueError(f"train.update={settings.update!r} is none of gradient, delta")
    if settings.schedule not in ("constant", "cosine"):
        raise ValueError(f"train.schedule={settings.schedule!r} is none of constant, cosine")
    for key in ("steps", "batch_size", "micro_batch_size", "threads"):
        if getattr(settings, key) < 1:
            raise ValueError(f"train.{key}={getattr(settings, key)} must be at least 1")
    if settings.batch_size % settings.micro_batch_size:
        sizes = f"train.batch_size={settings.batch_size}, train.micro_batch_size={settings.micro_batch_size}"
        raise ValueError(f"{sizes}: the first must be a multiple of the second")
    for key in ("lr", "clip"):
        if not getattr(settings, key) > 0:
            raise ValueError(f"train.{key}={getattr(settings, key)} must be greater than 0")


def num_examples(settings: TrainSettings) -> int:
    """Windows that one client trains on in one round: its weight in the mean."""
    return settings.steps * settings.batch_size


def finetune(
    model: PeftModel,
    adapter: Mapping[str, Tensor],
    windows: Tensor,
    settings: TrainSettings,
    seed: int,
    on_step: Callable[[int], None] | None = None,
) -> tuple[Adapter, float]:
    """Trains the adapter on random batches of windows.

    Args:
        model: base model with any adapter of the same shape in it; left in an undefined state.
        adapter: where training starts.
        windows: ``[W, T]`` int64 token ids, W at least 1.
        seed: of batches and dropout; the same seed, data and thread count give the same update to the bit.
        on_step: called after each step with the steps done; may evaluate the model.

    Returns:
        The update (new adapter minus ``adapter``) and the mean training loss in nats per token.
    """
    assert len(windows) > 0, "empty client data is refused before training starts"
    set_adapter(model, adapter)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, settings)
    batches = torch.Generator().manual_seed(seed)
    device = parameters[0].device
    total_loss = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for step in range(settings.steps):
            model.train()
            picked = torch.randint(len(windows), (settings.batch_size,), generator=batches)
            for micro_batch in windows[picked].split(settings.micro_batch_size):
                share = len(micro_batch) / settings.batch_size
                loss = next_token_loss(model, micro_batch.to(device)) * share
                loss.backward()
                total_loss += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _schedule(settings, step)
            optimizer.step()
            optimizer.zero_grad()
            if on_step is not None:
                on_step(step + 1)
    return subtract(get_adapter(model), adapter), total_loss / settings.steps


def next_token_loss(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of every token but the first, given those before it, in nats per token.

    Args:
        model: a causal language model of transformers, with or without an adapter.
        windows: ``[W, T]`` int64 on the model's device.
    """
    logits = model(input_ids=windows).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())


def _optimizer(parameters: list[torch.nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.update == "gradient":
        return torch.optim.SGD(parameters, lr=settings.lr)
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _schedule(settings: TrainSettings, step: int) -> float:
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * step / settings.steps))
