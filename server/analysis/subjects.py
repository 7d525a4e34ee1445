"""What is analysed: runs by their output folders, with the recordings that they made, and recordings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradcodec.training.recording import Recording, load_recording
from server.records.results import RunResults, read_results

RECORDING = "updates.safetensors"


@dataclass(frozen=True)
class Subject:
    """A run, or a recording alone; ``lacks`` says in one line what is not there, and why."""

    name: str
    results: RunResults | None
    recording: Recording | None
    lacks: str = ""


def read_subjects(paths: Sequence[str]) -> list[Subject]:
    """In their order, each under a name of its own. Raises ValueError: one cannot be read."""
    names = [Path(path).absolute().stem if Path(path).is_file() else Path(path).absolute().name for path in paths]
    return [_read(Path(path), _unlike(names, number)) for number, path in enumerate(paths)]


def _unlike(names: Sequence[str], number: int) -> str:
    """The name, with its place where several have the same."""
    return names[number] if names.count(names[number]) == 1 else f"{names[number]} ({number + 1})"


def _read(path: Path, name: str) -> Subject:
    if path.is_file():
        return Subject(name, None, load_recording(path), "a recording alone: no losses, bytes or model")
    results = read_results(path)
    model = replace(results.settings.model, trust_remote_code=False)  # whose folder it is may not say so
    results.settings.model = model
    place = _recording_of(path, results)
    if place is not None:
        return Subject(name, results, load_recording(place))
    if results.settings.record is not None:
        lacks = f"its recording {Path(results.settings.record).name} is gone: only its losses and bytes are analysed"
    else:
        lacks = "no recording of updates: only its losses and bytes are analysed (arm=dense record=FILE makes one)"
    return Subject(name, results, None, lacks)


def _recording_of(run: Path, results: RunResults) -> Path | None:
    """Where it was written, or beside the results, for a folder that was moved."""
    said = Path(results.settings.record) if results.settings.record is not None else run / RECORDING
    places = (said, run / said.name, run.parent / said.name) if results.settings.record is not None else (said,)
    return next((place for place in places if place.is_file()), None)
