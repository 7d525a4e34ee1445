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
from adapters.team import Team

IGNORED = -100
"""The label of a token that does not count; ``cross_entropy`` leaves it out."""


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


@dataclass
class TrainSettings:
    """One client's local training in one round."""

    update: str = "gradient"  # gradient (SGD here, adaptive on the server) | delta (AdamW here, mean on the server)
    steps: int = 10  # on windows drawn with replacement
    epochs: int | None = None  # instead of steps: how often every window is trained on, in a new order each time
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
    if settings.epochs is not None and settings.epochs < 1:
        raise ValueError(f"train.epochs={settings.epochs} must be at least 1, or null for train.steps")
    if settings.batch_size % settings.micro_batch_size:
        sizes = f"train.batch_size={settings.batch_size}, train.micro_batch_size={settings.micro_batch_size}"
        raise ValueError(f"{sizes}: the first must be a multiple of the second")
    for key in ("lr", "clip"):
        if not getattr(settings, key) > 0:
            raise ValueError(f"train.{key}={getattr(settings, key)} must be greater than 0")


def num_examples(settings: TrainSettings, num_windows: int) -> int:
    """Windows that a client with ``num_windows`` trains on in one round: its weight in the mean."""
    if settings.epochs is not None:
        return settings.epochs * num_windows
    return settings.steps * settings.batch_size


def num_steps(settings: TrainSettings, num_windows: int) -> int:
    """Steps that a client with ``num_windows`` takes in one round; the last of an epoch may be a smaller one."""
    if settings.epochs is not None:
        return settings.epochs * math.ceil(num_windows / settings.batch_size)
    return settings.steps


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
        seed: of batches and dropout; the same seed, data and thread count give the same update to the bit.
        on_step: called after each step with the steps done; may evaluate the model.
        team: processes that do this together, all with the same arguments; all get the same update, which is that of
            one process but for the order of float sums (and for dropout, which every process draws on its own).

    Returns:
        The update (new adapter minus ``adapter``), float32 on the model's device, and the mean training loss in nats
        per token.
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
            total_loss += team.add_up(parameters, step_loss)
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
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * step / steps))
