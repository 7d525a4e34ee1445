"""Recording -> trained codec, whichever the registry knows a trainer for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gradcodec.artifact import Artifact
from gradcodec.registry import loaded, trained_by
from gradcodec.settings import FitSettings
from gradcodec.training.recording import Recording, Update

Progress = Callable[[int, int, float], None]
"""Called with what is done, what there is to do, and the loss."""


@dataclass(frozen=True)
class Fitting:
    """What a codec is trained on, and how.

    Attributes:
        recording: all that was recorded; the global updates of its rounds are known to both ends.
        updates: those of the recording to train on.
        provenance: goes into the artifact as it is; JSON.
        settings: of the training.
        seed: of all that is random.
        progress: called while it lasts.
    """

    recording: Recording
    updates: Sequence[Update]
    provenance: dict[str, Any]
    settings: FitSettings
    seed: int
    progress: Progress


class Trainer(Protocol):
    """What ``CodecEntry.trainer`` names: a function from one of ``CodecEntry.trained_as`` to an artifact."""

    def __call__(self, name: str, fitting: Fitting) -> Artifact:
        """Trains."""
        ...


def train_codec(name: str, fitting: Fitting) -> Artifact:
    """Trains one of ``gradcodec.registry.trainable_names``. Raises KeyError: ``name`` is none of them."""
    entry = trained_by(name)
    assert entry.trainer is not None
    train: Trainer = loaded(entry.trainer)
    return train(name, fitting)
