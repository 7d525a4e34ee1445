"""Finished runs as a comparison reads them: what their ``results.json`` says, or why it says nothing. Loads no engine.

A folder may be anybody's: whatever is in it, reading it gives runs, or one ValueError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.console import printable
from conf.standard import OF_THIS_RUN, flat
from server.records.curves import bytes_by_round
from strategies.outcomes import DOWNLINK_BYTES

RESULTS, SUMMARY = "results.json", "summary.json"
LARGEST = 1 << 30
"""Bytes of a file that is read."""


@dataclass(frozen=True)
class FinishedRun:
    """One run."""

    folder: str
    settings: Mapping[str, Any]  # group.key -> value, without those that tell no two runs apart, or have no effect
    losses: Sequence[float]  # held out, before the first round and after each
    bytes_by_round: Sequence[int]  # everything counted; as many as losses
    bytes_up: float  # of one client and round
    bits_per_parameter: float
    seconds: float

    @property
    def loss(self) -> float:
        """The final one."""
        return self.losses[-1]

    @property
    def bytes_in_all(self) -> int:
        return self.bytes_by_round[-1]

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")


@dataclass(frozen=True)
class Failure:
    """A run of which there are no results, and why."""

    folder: str
    reason: str


def read_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[Failure]]:
    """The runs of all these folders, each that of a run, of a sweep (``-m``), or one with folders of runs in it.

    Raises:
        ValueError: a folder is none of these, or what is in it cannot be read. Jobs of a sweep that did not finish are
            among the failures instead.
    """
    runs: list[FinishedRun] = []
    failures: list[Failure] = []
    for folder in folders:
        if (folder / RESULTS).is_file():
            runs.append(read_run(folder))
        elif (folder / SUMMARY).is_file():
            finished, failed = _read_sweep(folder)
            runs += finished
            failures += failed
        elif inner := sorted(path.parent for path in folder.glob(f"*/{RESULTS}")):
            runs += map(read_run, inner)
        else:
            raise ValueError(
                f"{printable(folder)} holds no {RESULTS}, no {SUMMARY} and no folders of runs: give finished runs"
            )
    return runs, failures


def _read_sweep(folder: Path) -> tuple[list[FinishedRun], list[Failure]]:
    jobs = _json(folder / SUMMARY).get("jobs")
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise ValueError(f"{printable(folder / SUMMARY)} is not what a sweep writes")
    return read_jobs([(str(job.get("folder")), str(job.get("state")), str(job.get("reason", ""))) for job in jobs])


def read_jobs(jobs: Sequence[tuple[str, str, str]]) -> tuple[list[FinishedRun], list[Failure]]:
    """Folder, state and reason of each job of a sweep -> those that finished, and those that did not."""
    runs: list[FinishedRun] = []
    failures: list[Failure] = []
    for folder, state, reason in jobs:
        try:
            if state != "finished":
                raise ValueError(reason or state)
            runs.append(read_run(Path(folder)))
        except ValueError as error:
            failures.append(Failure(printable(folder), printable(error)))
    return runs, failures


def read_run(folder: Path) -> FinishedRun:
    """One finished run. Raises ValueError: its results are not here, damaged, or somebody else's."""
    path = folder / RESULTS
    content = _json(path)
    try:
        return _run_of(folder, content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{printable(path)} is not what a run writes: {printable(repr(error), 120)}") from None


def _run_of(folder: Path, content: Mapping[str, Any]) -> FinishedRun:
    losses = [_number(loss) for loss in content["heldout_loss"]] or _on_the_nodes(content)
    sizes = content["bytes"]
    curve = bytes_by_round(
        [(_count(one["server_round"]), _count(one["payload_bytes"])) for one in content["uplinks"]],
        [
            (_count(one["server_round"]), sum(_count(one[part]) for part in DOWNLINK_BYTES))
            for one in content["downlinks"]
        ],
        [_count(size) for size in content["delivery_bytes"]],
        _count(sizes["artifact"]) + _count(sizes.get("recording", 0)),  # which earlier versions did not count
        len(losses) - 1,
    )
    settings = flat({str(key): value for key, value in content["settings"].items()})
    return FinishedRun(
        str(folder),
        {key: value for key, value in settings.items() if key not in OF_THIS_RUN and _counts(key, settings)},
        losses,
        curve,
        _number(content["uplink_payload_bytes_per_client_round"]),
        _number(content["bits_per_parameter"]),
        _number(content["seconds"]),
    )


def _on_the_nodes(content: Mapping[str, Any]) -> list[float]:
    """Of a run whose server held no base model."""
    by_round = {_count(one["server_round"]): _number(one["loss"]) for one in content["federated_loss"]}
    if not by_round or sorted(by_round) != [*range(max(by_round) + 1)]:
        raise ValueError("it has no loss of every round: federation.evaluate_every=1 has nodes measure it")
    return [by_round[number] for number in sorted(by_round)]


def _counts(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting has an effect: a codec's has none where nothing is coded."""
    return settings.get("arm") == "coded" or not key.startswith("codec.")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{printable(path)} is not here: the run did not finish") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)} cannot be read: {printable(error, 120)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)} is not what a run writes")
    return content


def _number(value: Any) -> float:
    """Infinite ones, too: of a run that diverged."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise TypeError(f"{printable(value, 40)!r} is no number")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise TypeError(f"{printable(value, 40)!r} is no count")
    return value
