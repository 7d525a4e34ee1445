"""The settings of codecs and of their training, and their checks. Loads no torch.

A check names a key as it stands in its dataclass (``bits``); who keeps the group under a name of its own puts that in
front.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradcodec.errors import ArtifactError, CodecError
from gradcodec.registry import CodecEntry, codec_names, entry_of, loaded, names_with_a_rate, options_of

BASES = ("auto", "artifact", "model", "moves")


@dataclass
class CodecSettings:
    """Which codec, at which rate, with how much error feedback."""

    name: str = "learned"
    bits: float | None = 0.5  # bits per parameter of the whole payload, at most; null: the codec's own rate
    # bits per parameter of a broadcast of the server's step, at most; null: the adapter goes down as float32
    down_bits: float | None = None
    snr_db: float | None = None  # the cheapest payload of this signal-to-noise ratio, still of at most `bits`
    # folder of a trained codec, for those that are trained; null: `learned` takes the general one, which it comes with
    artifact: str | None = None
    # directions along the width: artifact: its own; model: derived on both ends from the base model and how the adapter
    # moved; moves: from the moves alone; auto: the artifact's own if it has some, else model, else moves
    basis: str = "auto"
    digest: str | None = None  # set by the server: the artifact that both ends must have
    feedback: float = 0.5  # share of the residual that goes into the next target; 0: no error feedback, 1: no leak
    options: dict[str, Any] = field(default_factory=dict)  # the codec's own settings (`CodecEntry.options`)


@dataclass
class FitSettings:
    """How codecs are trained."""

    directions: int = 96  # leading directions that `learned` keeps along the width of a tensor, at most half of it
    passes: int = 6  # how often quantiser and entropy models of `learned` are fitted to each other
    network_steps: int = 300  # optimizer steps of the paper's autoencoders


def check_codec(settings: CodecSettings) -> None:
    """Raises CodecError whose text begins with the first key that cannot be served, as ``<key>=<value>``."""
    entry = _entry_of(settings.name)
    if settings.bits is not None and not 0 < settings.bits <= 64:
        raise CodecError(f"bits={settings.bits} bits per parameter: choose more than 0 and at most 64, or null")
    if settings.down_bits is not None and not 0 < settings.down_bits <= 64:
        raise CodecError(
            f"down_bits={settings.down_bits} bits per parameter: choose more than 0 and at most 64, or null"
        )
    if settings.snr_db is not None:
        if not 0 < settings.snr_db <= 60:
            raise CodecError(f"snr_db={settings.snr_db} dB: choose more than 0 and at most 60, or null")
        if not entry.has_rate:
            raise CodecError(
                f"snr_db={settings.snr_db}: the codec {entry.name} has one rate; {', '.join(names_with_a_rate())} "
                "have more"
            )
        if settings.bits is None:
            raise CodecError(f"snr_db={settings.snr_db} needs bits, too: the most that a payload may take")
    _check_basis(settings.basis, entry)
    if not 0 <= settings.feedback <= 1:
        raise CodecError(f"feedback={settings.feedback} must lie between 0 and 1")
    if entry.needs_artifact and settings.artifact is None and entry.general_artifact is None:
        raise ArtifactError(f"artifact=null: the codec {entry.name} needs the folder of a trained artifact")
    _check_options(settings.options, entry)


def _entry_of(name: str) -> CodecEntry:
    if name not in codec_names():
        known = ", ".join(codec_names())
        raise CodecError(f"name={name!r} is none of {known}, the codecs that are installed here")
    try:
        return entry_of(name)
    except CodecError as error:
        raise CodecError(f"name={name!r}: {error}") from error


def _check_options(given: Mapping[str, Any], entry: CodecEntry) -> None:
    options = options_of(entry.name, given)
    if entry.check is not None:
        try:
            loaded(entry.check)(**options)
        except ValueError as error:
            raise CodecError(f"options.{error}") from None


def _check_basis(basis: str, entry: CodecEntry) -> None:
    if basis not in BASES:
        raise CodecError(f"basis={basis!r} is none of {', '.join(BASES)}")
    if basis in ("model", "moves") and not entry.derives_directions:
        raise CodecError(f"basis={basis}: the codec {entry.name} has no directions along the width to derive")
