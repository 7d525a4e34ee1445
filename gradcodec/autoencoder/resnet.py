"""The paper's autoencoders as codecs: the whole update as one picture, through a network and back.

CG-FedLLM (Wu et al. 2024, arXiv 2405.13746), section 3.1 and figure 2: ``[1, 4096, 2048]`` to ``[64, 64, 32]`` at
LLaMA-7B geometry, an fp32 latent of 1/64 of the elements, Tanh output (``networks.py``: ResNet, 1-D CNN, U-Former).
Kept as honest, measured ablations: see ``docs/negative-results.md``.

Departures: any other geometry is padded with zeros to the next picture whose sides are multiples of 64; unless
``literal``, every block is divided by its root mean square (sent as float32) and the output is linear.
Shape suffixes: H height, W width of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gradcodec.artifact import Artifact
from gradcodec.autoencoder.networks import ARCHITECTURES, STAGES, Autoencoder
from gradcodec.codec import WithoutSideInformation, codec_id, floats_of, floats_to_bytes
from gradcodec.errors import CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout

_SIDE = 2**STAGES


def picture_shape(num_parameters: int) -> tuple[int, int]:
    """Height and width, multiples of 64, about two to one: ``(4096, 2048)`` for LLaMA-7B at rank 8."""
    width = _SIDE * math.ceil(math.sqrt(num_parameters / 2) / _SIDE)
    return _SIDE * math.ceil(num_parameters / width / _SIDE), width


class ResnetCodec(WithoutSideInformation):
    """``resnet``, ``cnn1d`` and ``uformer``: one rate, half a bit per parameter; they ignore the budget."""

    num_streams = 2

    def __init__(
        self, layout: Layout, network: Autoencoder, literal: bool, weights_digest: bytes, kind: str = "resnet"
    ) -> None:
        self.layout = layout
        self.literal = literal
        self.id = codec_id(f"{kind}/1", weights_digest)
        self._network = network.eval()
        self._height, self._width = picture_shape(layout.num_parameters)

    @classmethod
    def from_artifact(cls, artifact: Artifact, layout: Layout) -> ResnetCodec:
        """Raises CodecError: the artifact was trained for another geometry, or its tensors are not the network's."""
        settings = artifact.settings.get("codec")
        settings = settings if isinstance(settings, dict) else {}
        trained_for = settings.get("layout")
        if trained_for != layout.id.hex():
            raise CodecError(
                f"the {artifact.kind} artifact was trained for layout {trained_for}, this model and adapter have "
                f"{layout.id.hex()}: run `python -m tgap` with this model, rank and target modules"
            )
        literal = bool(settings.get("literal"))
        network = ARCHITECTURES[artifact.kind](literal)
        try:
            network.load_state_dict(dict(artifact.tensors))
        except RuntimeError as error:
            raise CodecError(f"the {artifact.kind} artifact does not fit the network: {error}") from None
        return cls(layout, network, literal, bytes.fromhex(artifact.digest), artifact.kind)

    @torch.no_grad()
    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        blocks_RC = blocks_RC.cpu()
        scales = _scales(blocks_RC, self.layout, self.literal)
        picture_HW = to_picture(blocks_RC, scales, self.layout)
        latent = self._network.encoder(picture_HW[None, None])
        return floats_to_bytes(scales), floats_to_bytes(latent)

    @torch.no_grad()
    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        scales = floats_of(codes[0], len(self.layout.blocks))
        shape = self._network.latent_shape(self._height, self._width)
        latent = floats_of(codes[1], math.prod(shape))
        picture = self._network.decoder(latent.reshape(1, *shape)).reshape(self._height, self._width)
        return from_picture(picture, scales, self.layout)


def to_picture(blocks_RC: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Blocks ``[R, C]`` over their scales, value after value, zero-padded: ``[H, W]``."""
    height, width = picture_shape(layout.num_parameters)
    widths = torch.tensor([block.width for block in layout.blocks])
    values = layout.flatten(blocks_RC / scales.repeat_interleave(widths))
    return nn.functional.pad(values, (0, height * width - len(values))).reshape(height, width)


def from_picture(picture_HW: Tensor, scales: Tensor, layout: Layout) -> Tensor:
    """Inverse of ``to_picture``."""
    widths = torch.tensor([block.width for block in layout.blocks])
    values = picture_HW.flatten()[: layout.num_parameters]
    return layout.unflatten(values) * scales.repeat_interleave(widths)


def _scales(blocks_RC: Tensor, layout: Layout, literal: bool) -> Tensor:
    """Per block what its values are divided by, ``[B]``: their root mean square, or 1 if ``literal``."""
    if literal:
        return torch.ones(len(layout.blocks))
    parts = [blocks_RC[: block.rank, block.start : block.stop] for block in layout.blocks]
    return torch.stack([part.square().mean().sqrt() for part in parts]).clamp_min(1e-20)


def fit_resnet(
    samples: Sequence[Tensor],
    layout: Layout,
    *,
    literal: bool,
    steps: int,
    seed: int,
    batch: int = 4,
    architecture: str = "resnet",
    progress: Callable[[int, int, float], None] | None = None,
) -> Autoencoder:
    """Trains on recorded blocks ``[R, C]``: mean squared error, Adam at 2e-4 (the paper, section 3.1)."""
    pictures = torch.stack([to_picture(b, _scales(b, layout, literal), layout) for b in samples])[:, None]
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
