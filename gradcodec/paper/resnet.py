"""The paper's autoencoders as codecs: the whole update as one picture, through a network and back.

CG-FedLLM (Wu et al. 2024, arXiv 2405.13746), section 3.1 and figure 2: ``[1, 4096, 2048]`` to ``[64, 64, 32]`` at
LLaMA-7B geometry, an fp32 latent of 1/64 of the elements, Tanh output (``networks.py``: ResNet, 1-D CNN, U-Former).
Kept as honest, measured ablations: see ``docs/negative-results.md``.

Departures: any other geometry is padded with zeros to the next picture whose sides are multiples of 64; unless
``literal``, every block is divided by its root mean square (sent as float32) and the output is linear.
Shape suffixes: R rank, C columns, H height and W width of the picture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.codec import WithoutSideInformation, codec_id, floats_of, floats_to_bytes
from gradcodec.errors import ArtifactError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.paper.networks import ARCHITECTURES, Autoencoder
from gradcodec.paper.picture import from_picture, picture_shape, scales_of, to_picture


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
    def stream_bytes(cls, layout: Layout) -> tuple[int, ...]:
        """Bytes of scales and latent, the same for all three."""
        return 4 * len(layout.blocks), 4 * math.prod(Autoencoder.latent_shape(*picture_shape(layout.num_parameters)))

    @classmethod
    def from_artifact(cls, artifact: Artifact, layout: Layout, device: torch.device | str = "cpu") -> ResnetCodec:
        """Works on the CPU, whatever the device.

        Raises:
            ArtifactError: the artifact was trained for another geometry, or its tensors are not the network's.
        """
        settings = artifact.settings.get("codec")
        settings = settings if isinstance(settings, dict) else {}
        trained_for = settings.get("layout")
        if trained_for != layout.id.hex():
            raise ArtifactError(
                f"the {artifact.kind} artifact was trained for layout {trained_for}, this adapter has layout "
                f"{layout.id.hex()}: it serves no other tensors or shapes"
            )
        literal = bool(settings.get("literal"))
        network = ARCHITECTURES[artifact.kind](literal)
        try:
            network.load_state_dict(dict(artifact.tensors))
        except RuntimeError as error:
            raise ArtifactError(f"the {artifact.kind} artifact does not fit the network: {error}") from None
        return cls(layout, network, literal, bytes.fromhex(artifact.digest), artifact.kind)

    @torch.no_grad()
    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        blocks_RC = blocks_RC.cpu()
        scales = scales_of(blocks_RC, self.layout, self.literal)
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
