"""Settings, base model and adapter -> the codec of every round. What client and server have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from adapters.settings import ModelSettings
from adapters.spaces import NoWeightsError, Wanted, spaces_of
from conf.schema import NONE, Settings
from gradcodec.build import build_codec
from gradcodec.errors import ArtifactError
from gradcodec.layout import Layout
from gradcodec.learned.basis import Prior
from gradcodec.learned.codec import LearnedCodec
from gradcodec.rounds import Codecs, DerivedCodecs, SameCodec

_LOG = logging.getLogger(__name__)


def codecs_of(
    settings: Settings, layout: Layout, seeded: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Codecs:
    """
    Args:
        settings: of the run; paths are this machine's. ``codec.basis=auto`` becomes what it comes to here, so that
            nodes are told, and one that cannot do the same says so at the roll call.
        layout: of the adapter.
        seeded: the adapter that the seed gives, from which a run starts if ``lora.start`` names no other.
        device: where the codec works.

    Raises:
        ValueError: the artifact or the base model's weights are not as they are needed.
    """
    codec = build_codec(settings.codec, layout, device)
    if not isinstance(codec, LearnedCodec):
        return SameCodec(codec)
    basis = settings.codec.basis
    if basis == "auto" and (codec.tables.leading or not codec.tables.serve_derived):
        basis = "artifact"
    if basis == "auto" and settings.server.base == NONE:
        basis = "moves"  # which the server knows as well
    settings.codec.basis = basis
    if basis == "artifact":
        return SameCodec(codec)
    if not codec.tables.serve_derived:
        raise ArtifactError(
            f"codec.artifact={settings.codec.artifact} was trained with directions of its own and has no levels for "
            f"derived ones: with codec.basis={basis} take the general one (codec.artifact=null), or train one with "
            "`python -m tgap.general`"
        )
    priors: dict[str, Prior] = {}
    if basis != "moves":
        try:
            priors = priors_of(settings.model, layout)
        except NoWeightsError as error:
            if basis == "model":
                raise
            _LOG.warning("directions along the width come from the adapter's moves alone: %s", error)
    if basis == "auto":
        settings.codec.basis = "model" if priors else "moves"
    return DerivedCodecs(codec, priors, None if settings.lora.start is not None else seeded)


def priors_of(model: ModelSettings, layout: Layout) -> dict[str, Prior]:
    """What the base model says of where each block's updates will lie. Raises ValueError: it cannot be read."""
    wanted = [Wanted(block.name, block.tensor, block.rows) for block in layout.blocks if not block.is_vector]
    spaces = spaces_of(model, wanted)
    return {name: Prior(space.directions_WK, space.shares_K) for name, space in spaces.items()}
