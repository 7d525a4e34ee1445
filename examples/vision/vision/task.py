"""The network, the digits, and what client and server do with them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

HELDOUT = 5  # each so manieth digit is the server's, to measure with
NUM_LABELS = 10
Data = tuple[Tensor, Tensor]  # images [N, 1, 8, 8], labels [N]


def make_network() -> nn.Module:
    """Two convolutions with batch norms, and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, NUM_LABELS),
    )


def partition(number: int, of: int, dirichlet: float, seed: int) -> Data:
    """One client's digits: of each label all clients get shares that a Dirichlet distribution draws."""
    images, labels = _digits()
    is_trained = torch.arange(len(labels)) % HELDOUT != 0
    rng = np.random.default_rng(seed)
    mine: list[int] = []
    for label in range(NUM_LABELS):
        places = rng.permutation(((labels == label) & is_trained).nonzero().flatten().numpy())
        ends = np.cumsum(rng.dirichlet([dirichlet] * of)) * len(places)
        ends = [0, *np.round(ends).astype(int)]
        mine += places[ends[number] : ends[number + 1]].tolist()
    return images[mine], labels[mine]


def heldout() -> Data:
    """What nobody trains on."""
    images, labels = _digits()
    return images[::HELDOUT], labels[::HELDOUT]


def train(network: nn.Module, data: Data, config: dict, seed: tuple[int, ...]) -> float:
    """A client's round; the mean loss."""
    (images, labels), size, losses = data, config["batch-size"], []
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=config["learning-rate"], momentum=0.9)
    network.train()
    for _ in range(config["local-epochs"]):
        order = torch.from_numpy(rng.permutation(len(labels)))
        for places in order.split(size):
            if len(places) < 2:  # a batch norm needs several
                continue
            loss = nn.functional.cross_entropy(network(images[places]), labels[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / max(len(losses), 1)


@torch.no_grad()
def evaluate(network: nn.Module, data: Data) -> tuple[float, float]:
    """Loss and accuracy."""
    images, labels = data
    network.eval()
    scores = network(images)
    loss = nn.functional.cross_entropy(scores, labels).item()
    return loss, (scores.argmax(1) == labels).float().mean().item()


@cache
def _digits() -> Data:
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    return images, torch.from_numpy(digits.target).long()
