"""Trains the paper's autoencoders on recorded updates: mean squared error, Adam at 2e-4 (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradcodec.artifact import Artifact
from gradcodec.layout import Layout
from gradcodec.paper.networks import ARCHITECTURES, Autoencoder
from gradcodec.paper.picture import scales_of, to_picture
from gradcodec.training.fit import Fitting


def train(name: str, fitting: Fitting) -> Artifact:
    """``resnet``, ``cnn1d`` or ``uformer``, or with ``-literal`` behind it the paper's to the letter: a ``Trainer``."""
    network = fit_resnet(
        [update.blocks_RC for update in fitting.updates],
        fitting.recording.layout,
        name=name,
        steps=fitting.settings.network_steps,
        seed=fitting.seed,
        progress=fitting.progress,
    )
    architecture, literal = _variant(name)
    settings = {"layout": fitting.recording.layout.id.hex(), "literal": literal}
    return Artifact(architecture, network.state_dict(), {"codec": settings, "trained": fitting.provenance})


def fit_resnet(
    samples: Sequence[Tensor],
    layout: Layout,
    *,
    name: str,
    steps: int,
    seed: int,
    batch: int = 4,
    progress: Callable[[int, int, float], None] | None = None,
) -> Autoencoder:
    """Trains on recorded blocks ``[R, C]``: mean squared error, Adam at 2e-4 (the paper, section 3.1).

    Args:
        samples: what the network is trained on.
        layout: theirs.
        name: of the architecture, with ``-literal`` behind it for unscaled blocks and a Tanh at the end.
        steps: of the optimizer.
        seed: of the first weights and of the order.
        batch: pictures a step.
        progress: called after each step, with the loss.
    """
    architecture, literal = _variant(name)
    pictures = torch.stack([to_picture(b, scales_of(b, layout, literal), layout) for b in samples])[:, None]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ARCHITECTURES[architecture](literal)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
    for step in range(1, steps + 1):
        picked = pictures[torch.randint(len(pictures), (batch,), generator=generator)]
        loss = nn.functional.mse_loss(network.decoder(network.encoder(picked)).reshape(picked.shape), picked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step, steps, float(loss.detach()))
    return network


def _variant(name: str) -> tuple[str, bool]:
    """Architecture, and whether the paper's to the letter."""
    architecture, _, literal = name.partition("-")
    return architecture, bool(literal)
