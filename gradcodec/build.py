"""Settings -> codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

TRAINED = ("learned", "resnet", "cnn1d", "uformer")
"""Codecs that need an artifact."""
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
CODECS_WITH_A_RATE = ("learned", "eden", "topk", "powersgd", "b-only", "rotated")
CODECS_FOR_ANY_LAYOUT = ("learned", *_UNTRAINED)
"""Those that need no artifact of one geometry."""
CODECS = ("identity", *TRAINED, *(name for name in _UNTRAINED if name != "identity"))


@dataclass
class CodecSettings:
    """Which codec, at which rate, with how much error feedback."""

    name: str = "learned"
    bits: float | None = 0.5  # bits per parameter of the whole payload, at most; null: the codec's own rate
    snr_db: float | None = None  # the cheapest payload of this signal-to-noise ratio, still of at most `bits`
    artifact: str | None = None  # folder made by `python -m tgap`, for codecs that are trained
    digest: str | None = None  # set by the server: the artifact that both ends must have
    feedback: float = 0.5  # share of the residual that goes into the next target; 0: no error feedback, 1: no leak


ENCODING_UPDATES, DECODING_UPDATES = 6, 3
"""Memory that ``learned`` takes on its device, in fp32 updates, the update itself included. The other codecs take the
host's, most of them more."""


def check_codec(settings: CodecSettings) -> None:
    """Raises CodecError naming the first key that cannot be served."""
    if settings.name not in CODECS:
        raise CodecError(f"codec.name={settings.name!r} is none of {', '.join(CODECS)}")
    if settings.bits is not None and not 0 < settings.bits <= 64:
        raise CodecError(f"codec.bits={settings.bits} bits per parameter: choose more than 0 and at most 64, or null")
    if settings.snr_db is not None:
        if not 0 < settings.snr_db <= 60:
            raise CodecError(f"codec.snr_db={settings.snr_db} dB: choose more than 0 and at most 60, or null")
        if settings.name not in CODECS_WITH_A_RATE:
            raise CodecError(
                f"codec.snr_db: codec.name={settings.name} has one rate; {', '.join(CODECS_WITH_A_RATE)} have more"
            )
        if settings.bits is None:
            raise CodecError("codec.snr_db needs codec.bits, the most that it may take")
    if not 0 <= settings.feedback <= 1:
        raise CodecError(f"codec.feedback={settings.feedback} must lie between 0 and 1")
    if settings.name in TRAINED and settings.artifact is None:
        raise CodecError(f"codec.name={settings.name} needs codec.artifact: train one with `python -m tgap`")


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
