"""The codecs that are set side by side on one recording: shipped, given, trained on its first rounds, fixed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.settings import ModelSettings
from conf.basis import priors_of
from gradcodec.analysis.work import learned_values
from gradcodec.artifact import Artifact, load_artifact, said_kind
from gradcodec.build import artifact_folder, build_codec, codec_of
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.learned.basis import Prior
from gradcodec.learned.codec import LearnedCodec
from gradcodec.registry import codec_names, entry_of, trainable_names
from gradcodec.settings import CodecSettings, FitSettings
from gradcodec.training.coding import Coding
from gradcodec.training.fit import Fitting, train_codec
from gradcodec.training.recording import Recording, Update

SHIPPED = "learned"
"""The artifact that comes with the project, its directions derived as in a run."""
OWN = "learned (own)"
"""The same codec, trained on the recording's first rounds."""


@dataclass(frozen=True)
class Contender:
    """A codec for one recording, and how many values it has learned."""

    name: str
    codec: Codec | Mapping[int, Codec]
    has_rate: bool
    num_learned: int = 0

    def coding(self, recording: Recording, bits: float) -> Coding:
        """At a rate, or at its own if it has no other."""
        return Coding.of(self.name, self.codec, recording, bits if self.has_rate else None)


@dataclass(frozen=True)
class Given:
    """What contenders are made of.

    Attributes:
        names: codecs, and names that training is asked for by (``resnet-literal``).
        artifacts: folders of the user's own.
        network_steps: training of the paper's networks; 0 leaves them out.
        seed: of training.
    """

    names: Sequence[str]
    artifacts: Sequence[Path] = ()
    network_steps: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """A recording, what codecs are trained and what they are tried on, and what both ends of its run know."""

    recording: Recording
    train: Sequence[Update]
    tried: Sequence[Update]
    priors: Mapping[str, Prior]


def place_of(
    recording: Recording, train: Sequence[Update], tried: Sequence[Update], model: ModelSettings | None
) -> tuple[Place, str]:
    """With what the base model says of directions; and in one line why it says nothing, if so."""
    if model is None:
        return Place(recording, train, tried, {}), "no model is known: directions come from the adapter's moves alone"
    try:
        return Place(recording, train, tried, priors_of(model, recording.layout)), ""
    except ValueError as error:
        return Place(recording, train, tried, {}), f"directions come from the adapter's moves alone: {error}"


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: a name is neither a codec's nor one that training is asked for by."""
    known = list(dict.fromkeys([*codec_names(), *trainable_names()]))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--codecs holds {unknown[0]!r}, which is none of {', '.join(known)}")


def contenders(place: Place, given: Given) -> Iterator[Contender | str]:
    """Each in its turn, or in one line why one is left out."""
    for name in given.names:
        if name == "learned":
            yield serving(SHIPPED, load_artifact(artifact_folder(CodecSettings()), "learned"), place)
        if name not in trainable_names():
            yield _fixed(name, place)
        elif name != "learned" and not given.network_steps:
            yield f"{name} is left out: --network-steps 0"
        elif not place.train:
            yield f"{name} is not trained here: a recording of one round leaves nothing to measure it on"
        else:
            yield serving(OWN if name == "learned" else name, trained(name, place, given), place)
    for folder in given.artifacts:
        try:
            yield serving(folder.name, read_artifact(folder), place)
        except CodecError as error:
            yield f"--codec {folder.name} is left out: {error}"


def trained(name: str, place: Place, given: Given) -> Artifact:
    """On the first rounds of the recording."""
    settings = FitSettings(network_steps=given.network_steps or 1)
    fitting = Fitting(place.recording, place.train, {}, settings, given.seed, lambda *_: None)
    return train_codec(name, fitting)


def read_artifact(folder: Path) -> Artifact:
    """Of whatever kind. Raises CodecError: there is none, or it is damaged."""
    return load_artifact(folder, said_kind(folder) or "learned")


def serving(name: str, artifact: Artifact, place: Place) -> Contender:
    """What an artifact gives on a recording. Raises CodecError: it does not serve its layout."""
    entry, layout = entry_of(artifact.kind), place.recording.layout
    codec = codec_of(artifact, layout)
    size = learned_values(artifact.tensors)
    if isinstance(codec, LearnedCodec) and not codec.tables.leading and codec.tables.serve_derived:
        tried = {update.round for update in place.tried}  # the directions of a round take memory
        moved = {number: place.recording.moved_before(number) for number in tried}
        by_round = {number: codec.starting_from(place.priors, moved_RC) for number, moved_RC in moved.items()}
        return Contender(name, by_round, entry.has_rate, size)
    return Contender(name, codec, entry.has_rate, size)


def _fixed(name: str, place: Place) -> Contender | str:
    if entry_of(name).needs_artifact and name not in trainable_names():
        return f"{name} is left out: it needs an artifact, and --codec names none"
    return Contender(name, build_codec(CodecSettings(name=name), place.recording.layout), entry_of(name).has_rate)
