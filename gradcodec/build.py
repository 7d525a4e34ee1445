"""Settings -> codec, and what its payloads will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradcodec.artifact import Artifact, load_artifact
from gradcodec.codec import Codec, OneRate
from gradcodec.errors import ArtifactError
from gradcodec.exchange import max_payload_bytes
from gradcodec.frame import packed_bytes
from gradcodec.layout import Layout
from gradcodec.registry import codec_names, entry_of, loaded, options_of
from gradcodec.settings import CodecSettings, check_codec


def build_codec(settings: CodecSettings, layout: Layout, device: torch.device | str = "cpu") -> Codec:
    """The codec for a layout.

    Args:
        settings: name, options, artifact and digest count.
        layout: of the adapter whose updates are coded.
        device: where ``learned`` works; all others work on the CPU.

    Raises:
        CodecError: unknown name.
        ArtifactError: none, another one than ``settings.digest`` says, or one that does not serve this layout.
    """
    check_codec(settings)
    entry = entry_of(settings.name)
    if not entry.needs_artifact:
        codec: Codec = loaded(entry.codec)(layout, **options_of(settings.name, settings.options))
        return codec
    folder = artifact_folder(settings)
    artifact = load_artifact(folder, settings.name)
    if settings.digest is not None and artifact.digest != settings.digest:
        raise ArtifactError(
            f"codec artifact {folder} has digest {artifact.digest[:16]}, the other end's has "
            f"{settings.digest[:16]}: both need a copy of the same artifact"
        )
    return codec_of(artifact, layout, device, settings.options)


def artifact_folder(settings: CodecSettings) -> Path:
    """Of a codec that is trained: the one that is named, or the general one that comes with it. Raises ArtifactError:
    none is named, and none comes with it."""
    check_codec(settings)
    if settings.artifact is not None:
        return Path(settings.artifact)
    general = entry_of(settings.name).general_artifact
    assert general is not None
    return Path(__file__).parent / general


def codec_of(
    artifact: Artifact, layout: Layout, device: torch.device | str = "cpu", options: Mapping[str, Any] | None = None
) -> Codec:
    """The codec that an artifact holds. Raises ArtifactError: no such codec, or it does not serve this layout."""
    if artifact.kind not in codec_names() or not entry_of(artifact.kind).needs_artifact:
        raise ArtifactError(f"an artifact of kind {artifact.kind!r}: no trained codec of that name is registered")
    own = options_of(artifact.kind, options or {})
    codec: Codec = loaded(entry_of(artifact.kind).codec).from_artifact(artifact, layout, device, **own)
    return codec


def byte_budget(settings: CodecSettings, layout: Layout, rank: int | None = None) -> int | None:
    """Bytes that one payload may take, of a client that trains the first ``rank`` rows of every block; None where the
    codec has no rate to choose, or is left its own."""
    if settings.bits is None or not entry_of(settings.name).has_rate:
        return None
    trained = layout.num_parameters if rank is None else layout.num_parameters_of(rank)
    return max_payload_bytes(settings.bits, trained)


def broadcast_budget(settings: CodecSettings, layout: Layout) -> int | None:
    """The same of a step of the server's, ``gradcodec.broadcast``."""
    return byte_budget(replace(settings, bits=settings.down_bits), layout)


def payload_bytes(settings: CodecSettings, layout: Layout) -> int | None:
    """What one payload takes, known before there is an update: exactly, to the byte, if the codec has one rate; at
    most, if it has a budget. None: the codec takes what an update needs."""
    entry = entry_of(settings.name)
    if entry.has_rate:
        return byte_budget(settings, layout)
    codec: type[OneRate] = loaded(entry.codec)
    return packed_bytes(codec.stream_bytes(layout, **options_of(settings.name, settings.options)))
