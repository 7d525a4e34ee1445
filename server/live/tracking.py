"""Experiment trackers: a run's rounds, settings and final facts, told to TensorBoard, MLflow or W&B as it goes on.

The figures come from the run's events, as those of Prometheus do. What privacy withholds is not told: no client's own
figure is, nor who took part, nor a path of this host. Each tracker works in a thread of its own, so that a server which
does not answer holds nobody up; one that fails is given up with a warning, and the run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from conf.console import printable, say
from conf.schema import Settings
from server.live.trackers import FAILED, FINISHED, STOPPED, Mlflow, TensorBoard, TrackedRun, Wandb
from server.records.events import Event, EventLog
from server.records.results import RunResults
from strategies.outcomes import DOWNLINK_BYTES

LAST_SECONDS = 60.0
"""How long a tracker may take for what is left when the run has ended."""
LIBRARIES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Tracker -> the module of its library."""
OF_THIS_HOST = ("output", "resume", "record", "from_round", "run_id", "dry_run")
"""Settings that are no part of the experiment."""


class Tracker(Protocol):
    """One library. Any of these may raise whatever the library does."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Of a round."""

    def end(self, state: str, facts: Mapping[str, str], totals: Mapping[str, float]) -> None:
        """The run has ended; ``facts`` and ``totals`` are empty unless it finished."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError: a library is not installed."""
    for name in names:
        if find_spec(LIBRARIES[name]) is None:
            raise ValueError(
                f"federation.trackers holds {name}, which is not installed: pip install 'cg-fedllm[{name}]'"
            )


def open_tracker(name: str, run: TrackedRun) -> Tracker:
    """Loads the library, which takes a second or more."""
    kinds: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "mlflow": Mlflow, "wandb": Wandb}
    return kinds[name](run)


class Told(threading.Thread):
    """A tracker's own thread: takes what is to be told, in its order."""

    def __init__(self, name: str, opened: Callable[[], Tracker]) -> None:
        super().__init__(name=f"tracker {name}", daemon=True)
        self._tracker = name
        self._opened = opened
        self._queue: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self.start()

    def tell(self, what: Callable[[Tracker], None] | None) -> None:
        """None: that was all."""
        self._queue.put(what)

    def run(self) -> None:
        try:
            tracker = self._opened()
            while (what := self._queue.get()) is not None:
                what(tracker)
        except Exception as error:
            say(f"warning: the tracker {self._tracker} fails, and the run goes on without it: {printable(repr(error))}")

    def wait(self, seconds: float) -> None:
        self.join(seconds)
        if self.is_alive():
            say(f"warning: the tracker {self._tracker} does not come to its end; what it lacks is in the run's folder")


@dataclass
class Round:
    """What a round came to."""

    up: int = 0
    down: int = 0
    answers: int = 0
    faults: int = 0
    losses: list[float] = field(default_factory=list)  # of training, where clients say them
    began: float = 0.0

    def figures(self, now: float) -> dict[str, float]:
        trained = {"train_loss": fmean(self.losses)} if self.losses else {}
        return {
            "bytes_up": self.up,
            "bytes_down": self.down,
            "answers": self.answers,
            "faults": self.faults,
            "seconds": max(0.0, now - self.began),
            **trained,
        }


OF_A_ROUND = ("round_started", "uplink", "downlink", "fault", "round_finished")


class Tracking:
    """Tells the trackers of a run's events. A listener of its log."""

    def __init__(self, settings: Settings, told: Sequence[Told]) -> None:
        self._told = told
        self._secret = settings.privacy.secret_sampling
        self._rounds: dict[int, Round] = {}
        self._since = 0.0  # when the round before ended; 0: there was none
        self._facts: dict[str, str] = {}
        self._totals: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        number = event.get("server_round")
        if kind == "evaluated":
            self._tell(lambda tracker: tracker.figures(event["server_round"], {"heldout_loss": event["heldout_loss"]}))
        if kind == "evaluated_on_nodes" and event["clients"]:
            figures = {"loss_on_nodes": event["loss"], "worst_loss_on_nodes": event["worst"]}
            self._tell(lambda tracker: tracker.figures(event["server_round"], figures))
        if number is None or kind not in OF_A_ROUND or event.get("evaluating"):
            return
        own = self._rounds.setdefault(number, Round(began=self._since or event["time"]))
        if kind == "uplink":
            own.up += event["payload_bytes"]
            own.answers += 1
            own.losses += [event["train_loss"]] if event["train_loss"] is not None else []
        elif kind == "downlink":
            own.down += sum(event[part] for part in DOWNLINK_BYTES)
        elif kind == "fault":
            own.faults += 1
        elif kind == "round_finished":
            found, self._since = self._rounds.pop(number).figures(event["time"]), event["time"]
            kept = {"seconds": found["seconds"]} if self._secret else found  # else it tells how many took part
            self._tell(lambda tracker: tracker.figures(number, kept))

    def finish(self, results: RunResults) -> None:
        """The run has its results."""
        self._facts = results.facts()
        self._totals = {
            **({} if results.final_loss is None else {"final_heldout_loss": results.final_loss}),
            "total_bytes": results.account().total,
            "bits_per_parameter": results.bits_per_parameter,
            "total_seconds": results.seconds,
        }

    def end(self, state: str) -> None:
        """Tells how it ended, and waits for the trackers."""
        facts, totals = self._facts, self._totals
        self._tell(lambda tracker: tracker.end(state, facts, totals))
        for told in self._told:
            told.tell(None)
        for told in self._told:
            told.wait(LAST_SECONDS)

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for told in self._told:
            told.tell(what)


@contextlib.contextmanager
def tracked(settings: Settings, events: EventLog, done: int = 0) -> Iterator[Tracking]:
    """Tells the run's trackers of its events while the block runs.

    Args:
        settings: of the run.
        events: its log.
        done: rounds that a resumed run has done.

    Raises:
        ValueError: the library of a tracker is not installed.
    """
    names = list(dict.fromkeys(settings.federation.trackers))
    check_trackers(names)
    about = TrackedRun(
        settings.run_id or Path(settings.output).name,
        f"{settings.arm} {settings.codec.name}" if settings.arm == "coded" else settings.arm,
        Path(settings.output),
        told_settings(settings),
        done,
    )
    tracking = Tracking(settings, [Told(name, partial(open_tracker, name, about)) for name in names])
    if names:
        events.listeners.append(tracking)
    try:
        yield tracking
    except BaseException as error:
        tracking.end(STOPPED if isinstance(error, KeyboardInterrupt) else FAILED)
        raise
    tracking.end(FINISHED)


def told_settings(settings: Settings) -> dict[str, str]:
    """Key -> value of all that makes the experiment; of a path its last name alone."""
    flat = _flat(dataclasses.asdict(settings), "")
    return {key: _without_place(value) for key, value in flat.items() if key not in OF_THIS_HOST}


def _flat(values: Mapping[str, Any], head: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{head}{key}.") if isinstance(value, dict) else {f"{head}{key}": value}
    return found


def _without_place(value: Any) -> str:
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return "null" if value is None else str(value)
