"""Settings -> codec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from gradcodec.artifact import Artifact, load_artifact
from gradcodec.autoencoder.learned import LearnedCodec
from gradcodec.autoencoder.resnet import ResnetCodec
from gradcodec.codec import Codec, IdentityCodec
from gradcodec.errors import CodecError
from gradcodec.exchange import max_payload_bytes
from gradcodec.layout import Layout
from gradcodec.peers.b_only import BOnlyCodec
from gradcodec.peers.casts import Bf16Codec, Int8Codec, Nf4Codec, SignCodec
from gradcodec.peers.eden import EdenCodec
from gradcodec.peers.powersgd import PowersgdCodec
from gradcodec.peers.rotated import RotatedCodec
from gradcodec.peers.topk import TopkCodec
from gradcodec.settings import CODECS_WITH_A_RATE, CodecSettings, check_codec

_UNTRAINED: dict[str, Callable[[Layout], Codec]] = {
    "identity": IdentityCodec,
    "bf16": Bf16Codec,
    "int8": Int8Codec,
    "nf4": Nf4Codec,
    "sign": SignCodec,
    "eden": EdenCodec,
    "topk": TopkCodec,
    "powersgd": PowersgdCodec,
    "b-only": BOnlyCodec,
    "rotated": RotatedCodec,
}
CODECS_FOR_ANY_LAYOUT = ("learned", *_UNTRAINED)
"""Those that need no artifact of one geometry."""


ENCODING_UPDATES, DECODING_UPDATES = 6, 3
"""Memory that ``learned`` takes on its device, in fp32 updates, the update itself included. The other codecs take the
host's, most of them more."""


def build_codec(settings: CodecSettings, layout: Layout, device: torch.device | str = "cpu") -> Codec:
    """The codec for a layout.

    Args:
        device: where ``learned`` works; all others work on the CPU.

    Raises:
        CodecError: unknown name, no or another artifact than ``settings.digest`` says, an artifact that does not
            serve this layout.
    """
    check_codec(settings)
    if settings.name in _UNTRAINED:
        return _UNTRAINED[settings.name](layout)
    assert settings.artifact is not None
    artifact = load_artifact(Path(settings.artifact), settings.name)
    if settings.digest is not None and artifact.digest != settings.digest:
        raise CodecError(
            f"codec artifact {settings.artifact} has digest {artifact.digest[:16]}, the run uses "
            f"{settings.digest[:16]}: copy the server's artifact to this node"
        )
    return codec_of(artifact, layout, device)


def codec_of(artifact: Artifact, layout: Layout, device: torch.device | str = "cpu") -> Codec:
    """The codec that an artifact holds. Raises CodecError: it does not serve this layout."""
    if artifact.kind == "learned":
        return LearnedCodec.from_artifact(artifact, layout, device)
    return ResnetCodec.from_artifact(artifact, layout)


def byte_budget(settings: CodecSettings, layout: Layout) -> int | None:
    """Bytes that one payload may take; None where the codec has no rate to choose."""
    if settings.bits is None or settings.name not in CODECS_WITH_A_RATE:
        return None
    return max_payload_bytes(settings.bits, layout.num_parameters)
