"""The settings of codecs and of their training, and their checks. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

from gradcodec.errors import CodecError

TRAINED = ("learned", "resnet", "cnn1d", "uformer")
"""Codecs that need an artifact."""
CODECS_WITH_A_RATE = ("learned", "eden", "topk", "powersgd", "b-only", "rotated")
CODECS = ("identity", *TRAINED, "bf16", "int8", "nf4", "sign", "eden", "topk", "powersgd", "b-only", "rotated")
TRAINABLE = ("learned", "resnet", "resnet-literal", "cnn1d", "uformer")


@dataclass
class CodecSettings:
    """Which codec, at which rate, with how much error feedback."""

    name: str = "learned"
    bits: float | None = 0.5  # bits per parameter of the whole payload, at most; null: the codec's own rate
    snr_db: float | None = None  # the cheapest payload of this signal-to-noise ratio, still of at most `bits`
    artifact: str | None = None  # folder made by `python -m tgap`, for codecs that are trained
    digest: str | None = None  # set by the server: the artifact that both ends must have
    feedback: float = 0.5  # share of the residual that goes into the next target; 0: no error feedback, 1: no leak


@dataclass
class FitSettings:
    """How codecs are trained."""

    directions: int = 96  # leading directions that `learned` keeps along the width of a tensor, at most half of it
    passes: int = 6  # how often quantiser and entropy models of `learned` are fitted to each other
    network_steps: int = 300  # optimizer steps of the paper's autoencoders


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
