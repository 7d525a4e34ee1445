"""Every analysis of every run, as plain rows by section: what ``python -m server.analyse`` writes.

A row names its run; what could not be done stands in ``notes``, in one line each. The analyses themselves are in
``gradcodec.analysis``, ``gradcodec.training.measure`` and ``server.analysis.links``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gradcodec.analysis.control import SIGMAS, control, noise_before
from gradcodec.analysis.damage import damaged
from gradcodec.analysis.snr import snr_by_place
from gradcodec.analysis.spectra import spectra
from gradcodec.analysis.work import work_of
from gradcodec.artifact import Artifact, load_artifact
from gradcodec.build import artifact_folder
from gradcodec.errors import CodecError
from gradcodec.settings import CodecSettings
from gradcodec.training.measure import measure
from gradcodec.training.recording import Update
from server.analysis.contenders import (
    Contender,
    Given,
    Place,
    contenders,
    place_of,
    read_artifact,
    serving,
    trained,
)
from server.analysis.links import Link, course
from server.analysis.subjects import Subject

Rows = dict[str, list[dict[str, Any]]]
"""Section -> its rows."""
DIGITS = 6
"""Significant ones of a number in a row."""


@dataclass(frozen=True)
class Wanted:
    """Which analyses, and of what.

    Attributes:
        sections: names out of ``SECTIONS``.
        given: what codecs are made of.
        rates: bits a parameter of the rate-distortion curve.
        rate: that of all other analyses.
        updates: most updates of a recording that are coded in one analysis.
        links: that the seconds of a run are reckoned for.
    """

    sections: Sequence[str]
    given: Given
    rates: Sequence[float]
    rate: float
    updates: int
    links: Sequence[Link] = ()


SECTIONS = {
    "snr": "signal-to-noise ratio by layer, factor and round",
    "rate": "error energy over bits, beside the Gaussian bound",
    "noise": "noise before encoding, and whether the input is read at all",
    "damage": "bit errors and lost packets",
    "transfer": "one artifact over other data, ranks and models",
    "spectra": "singular values, tails and histograms of A and B",
    "work": "parameters, operations, memory and time",
    "loss": "loss over bytes and seconds",
}
"""Analysis -> what it is of."""
_ON_CODECS = ("snr", "rate", "noise", "damage", "work")


@dataclass
class Found:
    """Rows as they come, and what is lacking."""

    rows: Rows = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, section: str, run: str, *rows: Any, **more: Any) -> None:
        """Rows are dataclasses or mappings."""
        for row in rows:
            content = row if isinstance(row, Mapping) else asdict(row)
            self.rows.setdefault(section, []).append(
                {key: rounded(value) for key, value in {"run": run, **content, **more}.items()}
            )


@dataclass(frozen=True)
class Held:
    """A subject with a recording."""

    subject: Subject
    place: Place


def analyse(subjects: Sequence[Subject], wanted: Wanted, say: Callable[[str], None]) -> Found:
    """All that is wanted of all subjects; ``say`` is told what is being done."""
    found = Found()
    held = []
    for subject in subjects:
        found.add("runs", subject.name, _about(subject))
        if subject.lacks:
            found.notes.append(f"{subject.name}: {subject.lacks}")
        if "loss" in wanted.sections:
            _loss(subject, wanted, found)
        if subject.recording is not None and set(wanted.sections) - {"loss"}:
            held.append(_held(subject, wanted, found))
    for one in held:
        _of_recording(one, wanted, found, say)
    if "transfer" in wanted.sections and held:
        say("one artifact over all recordings")
        _transfer(held, wanted, found)
    return found


def _about(subject: Subject) -> dict[str, Any]:
    """What a reader wants to know of a run, without paths."""
    about: dict[str, Any] = {"arm": None, "model": None, "task": None, "rank": None, "update": None, "rounds": None}
    if subject.results is not None:
        settings = subject.results.settings
        about |= {
            "arm": settings.arm,
            "model": settings.model.path.rpartition("/")[2],
            "task": settings.task.name,
            "rank": settings.lora.rank,
            "update": settings.train.update,
            "rounds": len(subject.results.heldout_loss) - 1,
        }
    recording = subject.recording
    return about | {
        "parameters": recording.layout.num_parameters if recording else getattr(subject.results, "num_parameters", 0),
        "recorded_updates": len(recording.updates) if recording else 0,
        "recorded_rms": _rms(recording.updates) if recording else None,
    }


def _rms(updates: Sequence[Update]) -> float:
    return math.sqrt(sum(float(u.blocks_RC.double().square().mean()) for u in updates) / len(updates))


def _held(subject: Subject, wanted: Wanted, found: Found) -> Held:
    assert subject.recording is not None
    train, rest = subject.recording.first_third()
    if not rest:
        train, rest = [], train
    model = subject.results.settings.model if subject.results else None
    place, lacking = place_of(subject.recording, train, spread(rest, wanted.updates), model)
    if lacking:
        found.notes.append(f"{subject.name}: {lacking}")
    return Held(subject, place)


def spread(updates: Sequence[Update], most: int) -> list[Update]:
    """At most so many, whole rounds as far as they go, the last rounds first: controls need a round's other clients."""
    kept: list[Update] = []
    for number in sorted({update.round for update in updates}, reverse=True):
        kept += [update for update in updates if update.round == number][: most - len(kept)]
    return sorted(kept, key=lambda update: (update.round, update.client))


def _of_recording(held: Held, wanted: Wanted, found: Found, say: Callable[[str], None]) -> None:
    name = held.subject.name
    if "spectra" in wanted.sections:
        say(f"{name}: spectra")
        found.add("spectra", name, *spectra(held.place.recording))
    if "work" in wanted.sections:
        _model_work(held.subject, found)
    if not set(wanted.sections) & set(_ON_CODECS):
        return
    for contender in _making(held, wanted, say):
        if isinstance(contender, str):
            found.notes.append(f"{name}: {contender}")
            continue
        try:
            _of_codec(held, contender, wanted, found, say)
        except CodecError as error:
            found.notes.append(f"{name}: {contender.name} at {wanted.rate:g} bit: {error}")


def _making(held: Held, wanted: Wanted, say: Callable[[str], None]) -> Iterator[Contender | str]:
    say(f"{held.subject.name}: codecs are built and trained")
    yield from contenders(held.place, wanted.given)


def _of_codec(held: Held, contender: Contender, wanted: Wanted, found: Found, say: Callable[[str], None]) -> None:
    """Raises CodecError: its updates cannot be coded at the rate."""
    name, recording, tried = held.subject.name, held.place.recording, held.place.tried
    say(f"{name}: {contender.name}")
    coding = contender.coding(recording, wanted.rate)
    if "rate" in wanted.sections:
        _rate(held, contender, wanted, found)
    if "snr" in wanted.sections:
        for row in snr_by_place(coding, tried):
            found.add("snr", name, row, snr_db=row.snr_db, paper_snr_db=row.paper_snr_db)
    if "noise" in wanted.sections:
        judged = control(coding, tried)
        found.add("control", name, judged, reads_input=judged.reads_input)
        found.add("noise", name, *noise_before(coding, tried, SIGMAS, wanted.given.seed))
    if "damage" in wanted.sections:
        found.add("damage", name, *damaged(coding, tried, seed=wanted.given.seed))
    if "work" in wanted.sections:
        found.add("work", name, work_of(coding, tried[0], contender.num_learned))


def _rate(held: Held, contender: Contender, wanted: Wanted, found: Found) -> None:
    for rate in wanted.rates if contender.has_rate else [None]:
        try:
            heldout = {"later rounds": list(held.place.tried)}
            (row,) = measure(contender.name, contender.codec, held.place.recording, heldout, [rate])
        except CodecError as error:
            found.notes.append(f"{held.subject.name}: {contender.name} at {rate} bits: {error}")
            continue
        found.add(
            "rate",
            held.subject.name,
            {
                "codec": row.codec,
                "bits": row.bits,
                "error": row.error_energy,
                "gaussian_bound": 4.0**-row.bits,
                "cosine": row.cosine,
                "aggregate_cosine": row.aggregate_cosine,
                "snr_db": row.snr_db if math.isfinite(row.snr_db) else None,
                "updates": row.num_updates,
            },
        )


def _model_work(subject: Subject, found: Found) -> None:
    from adapters.work import step_work  # slow to import

    if subject.results is None:
        return
    settings = subject.results.settings
    try:
        work = step_work(settings.model, settings.lora, settings.train, settings.task.window)
    except ValueError as error:
        found.notes.append(f"{subject.name}: the language model's operations are not counted: {error}")
        return
    seconds = [one.seconds_train for one in subject.results.uplinks]
    steps = settings.train.steps if settings.train.epochs is None else None
    mean = sum(seconds) / len(seconds) if seconds else None
    per_step = mean / steps if mean is not None and steps else None
    found.add("model", subject.name, work, seconds_of_a_round=mean, seconds_of_a_step=per_step)


def _loss(subject: Subject, wanted: Wanted, found: Found) -> None:
    if subject.results is None:
        return
    for link in wanted.links:
        try:
            found.add("loss", subject.name, *course(subject.results, link), link=link.name)
        except ValueError as error:
            found.notes.append(f"{subject.name}: {error}")
            return


def _transfer(all_held: Sequence[Held], wanted: Wanted, found: Found) -> None:
    """Every artifact on every recording: shipped, given, and trained on each of them."""
    for source, artifact in _artifacts(all_held, wanted, found):
        for held in all_held:
            place = held.place
            try:
                contender = serving(source, artifact, place)
                rate = wanted.rate if contender.has_rate else None
                (row,) = measure(source, contender.codec, place.recording, {"later rounds": list(place.tried)}, [rate])
            except CodecError as error:
                found.add("transfer", held.subject.name, _transferred(source, artifact.kind, str(error)))
                continue
            served = {"bits": row.bits, "error": row.error_energy, "cosine": row.cosine}
            found.add("transfer", held.subject.name, _transferred(source, artifact.kind), **served)


def _transferred(artifact: str, kind: str, refused: str = "") -> dict[str, Any]:
    return {"artifact": artifact, "kind": kind, "bits": None, "error": None, "cosine": None, "refused": refused}


def _artifacts(all_held: Sequence[Held], wanted: Wanted, found: Found) -> Iterator[tuple[str, Artifact]]:
    yield "ships with the project", load_artifact(artifact_folder(CodecSettings()), "learned")
    for folder in wanted.given.artifacts:
        try:
            yield folder.name, read_artifact(folder)
        except CodecError as error:
            found.notes.append(f"--codec {folder.name} is left out: {error}")
    for held in all_held:
        if held.place.train:
            yield f"trained on {held.subject.name}", trained("learned", held.place, wanted.given)


def rounded(value: Any) -> Any:
    """Numbers to ``DIGITS`` significant digits, of lists as well; None for what is not finite, which JSON has not."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, (tuple, list)):
        return [rounded(one) for one in value]
    return value
