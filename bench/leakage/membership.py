"""Membership: whether a window of text was trained on, told from the adapter that a run ends with.

The attacker has the trained adapter and the base model, and the window. Two scores: the window's loss under the adapter
(Yeom et al. 2018), and how far the adapter lowers the base model's loss on it, which takes out how hard the window is
(Watson et al. 2022; the reference is the base model, where LiRA of Carlini et al. 2022 trains shadow models). The runs
are federations of the embedded model in one process, with few windows a client, so that each is seen often: a run with
more text remembers less of it. Knows training and channels' means; must not know attacks on single updates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.finetune import finetune
from adapters.model import Adapter, add, set_adapter
from adapters.settings import TrainSettings
from adapters.windows import Windows, next_token_loss
from bench.leakage.channels import Channel, Ends, transmit
from bench.leakage.scores import auc, true_positives_at
from bench.leakage.victim import Victim
from privacy.mechanism import norm_of
from tasks.settings import TaskSettings
from tasks.shards import load_shards

FALSE_RATE = 0.01


@dataclass(frozen=True)
class Federation:
    """All clients take part in every round; a client's window is trained on ``rounds * epochs`` times."""

    rounds: int = 4
    clients: int = 6
    windows: int = 24
    length: int = 64
    epochs: int = 2
    lr: float = 5e-3


def attack(victim: Victim, channel: Channel, federation: Federation, seed: int = 0) -> dict[str, Any]:
    """One run through a channel, and how well its members are told from windows of the same texts that it did not
    see."""
    held, others = deal(victim, federation)
    members = Windows.cat(held)
    base = _losses(victim, victim.seeded, members), _losses(victim, victim.seeded, others)
    adapter = run(victim, channel, held, federation, seed)
    trained = _losses(victim, adapter, members), _losses(victim, adapter, others)
    scores = {
        "loss": [[-float(loss) for loss in side] for side in trained],
        "loss beside the base model's": [
            [float(loss) for loss in before - after] for before, after in zip(base, trained, strict=True)
        ],
    }
    return {
        "channel": channel.name,
        "members": len(members),
        "others": len(others),
        "loss_of_members": float(trained[0].mean()),
        "loss_of_others": float(trained[1].mean()),
        "loss_of_members_before": float(base[0].mean()),
        "loss_of_others_before": float(base[1].mean()),
        "attacks": {
            name: {"auc": auc(*pair), "true_positives_at_1_percent": true_positives_at(FALSE_RATE, *pair)}
            for name, pair in scores.items()
        },
    }


def run(victim: Victim, channel: Channel, held: Sequence[Windows], federation: Federation, seed: int) -> Adapter:
    """The adapter after federated averaging; with noise, every update is cut to the median norm of a round without it,
    and each round's noise is what lets the whole run keep ``channel.epsilon``."""
    recipe = TrainSettings(update="delta", epochs=federation.epochs, batch_size=8, micro_batch_size=8, lr=federation.lr)
    adapter, moved = victim.seeded, victim.moved
    clip: float | None = None
    for number in range(federation.rounds):
        codec = victim.codecs.at(adapter)
        side = codec.side_information(victim.layout.to_blocks(moved))
        updates = [finetune(victim.model, adapter, one, recipe, seed + number)[0] for one in held]
        if clip is None:
            clip = float(torch.tensor([norm_of(update) for update in updates]).median())
        ends = Ends(codec, side, clip, federation.rounds)
        seen = [transmit(channel, [one], ends, 1000 * number + i + seed) for i, one in enumerate(updates)]
        moved = mean(seen)
        adapter = add(adapter, moved)
    return adapter


def mean(updates: Sequence[Adapter]) -> Adapter:
    """Of all updates alike."""
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


def deal(victim: Victim, federation: Federation) -> tuple[list[Windows], Windows]:
    """Each client's windows, and those of nobody: of every client's source code every other window is a member."""
    task = TaskSettings(window=federation.length, max_windows=4 * federation.windows)
    shards = load_shards(task, victim.tokenizer, range(federation.clients), federation.clients)
    whole = [shard.train[: 2 * federation.windows] for shard in shards]
    return [one[torch.arange(0, len(one), 2)] for one in whole], Windows.cat(
        [one[torch.arange(1, len(one), 2)] for one in whole]
    )


@torch.no_grad()
def _losses(victim: Victim, adapter: Adapter, windows: Windows) -> Tensor:
    """Of every window, nats a token."""
    set_adapter(victim.model, adapter)
    victim.model.eval()
    return torch.stack([next_token_loss(victim.model, one) for one in windows.split(1)])
