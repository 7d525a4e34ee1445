"""The paper's three autoencoders for pictures of gradients: ResNet, 1-D CNN and U-Former, at one rate.

CG-FedLLM (Wu et al. 2024, arXiv 2405.13746), section 3.1, figure 2 and the ablation of architectures. All turn
``[N, 1, H, W]``, sides multiples of 64, into a latent of 1/64 of the elements and back. The paper gives the ResNet's
stages and names the other two; their sizes are ours, chosen so that all three take the same bytes.

Knows pictures; must not know layouts or updates.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

STAGES = 6
CHANNELS = (8, 8, 16, 16, 32, 64)
LATENT_CHANNELS = 64
WINDOW = 8


class Autoencoder(nn.Module):
    """An ``encoder`` from pictures to latents and a ``decoder`` back."""

    encoder: nn.Module
    decoder: nn.Module

    @staticmethod
    def latent_shape(height: int, width: int) -> tuple[int, ...]:
        """Shape of one picture's latent."""
        return LATENT_CHANNELS, height >> STAGES, width >> STAGES


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class ResnetAutoencoder(Autoencoder):
    """Picture ``[N, 1, H, W]`` -> latent ``[N, 64, H/64, W/64]`` -> picture."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        sizes = (1, *CHANNELS)
        down: list[nn.Module] = []
        for before, after in pairwise(sizes):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        down += [_Residual(CHANNELS[-1]) for _ in range(3)]
        down.append(nn.Conv2d(CHANNELS[-1], LATENT_CHANNELS, 1))
        up: list[nn.Module] = [nn.Conv2d(LATENT_CHANNELS, CHANNELS[-1], 1)]
        up += [_Residual(CHANNELS[-1]) for _ in range(3)]
        for before, after in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
            up += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        up[-1] = nn.Tanh() if literal else nn.Identity()
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up)


class Cnn1dAutoencoder(Autoencoder):
    """The picture as one sequence: six stride-2 convolutions to ``[N, 1, H * W / 64]`` and back."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        sizes = (1, *CHANNELS)
        down: list[nn.Module] = [nn.Flatten(2)]
        for before, after in pairwise(sizes):
            down += [nn.Conv1d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        down.append(nn.Conv1d(CHANNELS[-1], 1, 1))
        up: list[nn.Module] = [nn.Conv1d(1, CHANNELS[-1], 1), nn.ReLU()]
        for before, after in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
            up += [nn.ConvTranspose1d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        up[-1] = nn.Tanh() if literal else nn.Identity()
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up)

    @staticmethod
    def latent_shape(height: int, width: int) -> tuple[int, ...]:
        return 1, (height * width) >> STAGES


class _WindowAttention(nn.Module):
    """A transformer block whose tokens see those of their own window only, with a convolution in its feed-forward.

    Uformer's LeWin block (Wang et al. 2022, "Uformer: A General U-Shaped Transformer for Image Restoration").
    """

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.GroupNorm(1, channels)])
        self.attention = nn.MultiheadAttention(channels, num_heads=max(channels // 16, 1), batch_first=True)
        self.forward_part = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1),
            nn.GELU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels),
            nn.GELU(),
            nn.Conv2d(2 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        size = self.window
        windows = x.reshape(n, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1).reshape(-1, size**2, c)
        tokens = self.norms[0](windows)
        windows = windows + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        x = windows.reshape(n, h // size, w // size, size, size, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        fed: Tensor = x + self.forward_part(self.norms[1](x))
        return fed


class UformerAutoencoder(Autoencoder):
    """U-shaped transformer: 4x4 patches, then windows of attention between stride-2 stages, to 64 channels.

    Without the U's skip connections: what they carry would have to be sent too.
    """

    def __init__(self, literal: bool) -> None:
        super().__init__()
        stages = [
            (16, WINDOW),
            (16, WINDOW),
            (32, WINDOW // 2),
            (32, WINDOW // 4),
        ]  # channels, windows after the patches
        down: list[nn.Module] = [nn.Conv2d(1, stages[0][0], 4, stride=4)]
        up: list[nn.Module] = [
            nn.Tanh() if literal else nn.Identity(),
            nn.ConvTranspose2d(stages[0][0], 1, 4, stride=4),
        ]
        outputs = [channels for channels, _ in stages[1:]] + [LATENT_CHANNELS]
        for (channels, window), after in zip(stages, outputs, strict=True):
            down += [_WindowAttention(channels, window), nn.Conv2d(channels, after, 4, stride=2, padding=1)]
            up += [_WindowAttention(channels, window), nn.ConvTranspose2d(after, channels, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*reversed(up))


ARCHITECTURES: dict[str, type[ResnetAutoencoder] | type[Cnn1dAutoencoder] | type[UformerAutoencoder]] = {
    "resnet": ResnetAutoencoder,
    "cnn1d": Cnn1dAutoencoder,
    "uformer": UformerAutoencoder,
}
