"""What a person sees while rounds run, told from the run's events: a bar on a terminal, else one line a round.

The same for every back end: in a simulation the events come from the run itself, of a run on a SuperLink from the log
in its output folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from conf.console import Display, bytes_text, display, printable, seconds_text
from conf.schema import Settings
from gradcodec.registry import entry_of
from server.records.events import Event, EventLog, RunStatus


def label(settings: Settings) -> str:
    """What kind of run it is: its arm, and the codec where there is one."""
    if settings.arm != "coded":
        return settings.arm
    has_rate = settings.codec.bits is not None and entry_of(settings.codec.name).has_rate
    rate = f" at {settings.codec.bits:g} bits" if has_rate else ""
    return f"coded ({settings.codec.name}{rate})"


class RunView:
    """Shows a run's events as they come."""

    def __init__(self, shown: Display) -> None:
        self.status = RunStatus()
        self._shown = shown
        self._came: list[str] = []  # partitions that answered in the round that is under way
        self._sent = 0  # bytes of their payloads
        self._down = 0  # bytes that went to clients before the round that is under way
        self._finished = ""  # of the last round, until its loss is known

    def skip(self, event: Event) -> None:
        """Takes an event of the past, and shows nothing."""
        self.status.add(event)
        self._down = self._trained_down()

    def __call__(self, event: Event) -> None:
        status, kind = self.status, event.get("event")
        rounds_done = status.server_round
        status.add(event)
        if kind in ("run_started", "run_resumed"):
            resumed = f", goes on after round {rounds_done}" if kind == "run_resumed" else ""
            self._line(f"{status.label}, {status.rounds} rounds{resumed}")
        elif kind in ("waiting", "nodes", "rehearsing"):
            self._line(self._before_rounds(event))
        elif kind == "round_started":
            self._came, self._sent = [], 0
        elif kind == "uplink":
            self._came.append(printable(event.get("partition"), 12))
            self._sent += max(0, size) if isinstance(size := event.get("payload_bytes"), int) else 0
        elif kind in ("fault", "node_refused", "checkpoint_failed", "budget_spent", "ended_early"):
            self._wrong(event)
        elif kind == "round_finished":
            self._finish_round()
        elif kind == "evaluated":
            self._evaluated(event)
        elif kind == "evaluated_on_nodes":
            self._evaluated_on_nodes(event)
        self._bar()

    def _before_rounds(self, event: Event) -> str:
        nodes = self.status.nodes
        return {
            "waiting": f"waiting for clients: {nodes} of {printable(event.get('of', '?'), 12)} are here",
            "nodes": f"{nodes} clients are here",
            "rehearsing": f"rehearsing: {printable(event.get('steps'), 12)} steps on the held-out text",
        }[str(event["event"])]

    def _finish_round(self) -> None:
        self._finished = self._round_text()
        self._down = self._trained_down()
        if not self.status.evaluates:  # nothing more will be known of it
            self._line(f"{self._finished}{self._left()}")
            self._finished = ""

    def _trained_down(self) -> int:
        """Bytes that went to clients so far to be trained from."""
        return self.status.bytes_down - self.status.bytes_evaluating

    def _left(self) -> str:
        left = self.status.seconds_left
        return "" if left is None else f", {seconds_text(left)} left"

    def _evaluated_on_nodes(self, event: Event) -> None:
        of_round, clients = printable(event.get("server_round"), 12), printable(event.get("clients"), 12)
        losses = [*self.status.node_losses.values()] if clients != "0" else []
        said = f"loss {losses[-1]:.4f}, worst {self.status.worst_client}" if losses else "no loss"
        self._line(
            f"on the nodes after round {of_round}: {said}, {clients} of {printable(event.get('asked'), 12)} clients"
        )

    def _wrong(self, event: Event) -> None:
        """What went wrong is said on a terminal, too."""
        reason = printable(event.get("reason"))
        said = {
            "fault": f"fault: {self.status.last_fault}",
            "node_refused": f"node {printable(event.get('node'), 24)} is refused: {reason}",
        }
        self._shown.tell(said.get(str(event["event"]), reason))

    def _evaluated(self, event: Event) -> None:
        status = self.status
        loss = f"held-out loss {status.heldout_loss[-1]:.4f}" if status.heldout_loss else "no held-out loss"
        what = self._finished or f"round {printable(event.get('server_round'), 12)} of {status.rounds}"
        self._line(f"{what}, {loss}{self._left()}")
        self._finished = ""

    def _round_text(self) -> str:
        status = self.status
        if not status.asked:  # the arm centralised has no clients
            return f"round {status.server_round} of {status.rounds}"
        came = sorted(self._came, key=lambda partition: (len(partition), partition))
        who = f" ({', '.join(came[:20])}{', ...' if len(came) > 20 else ''})" if came else ""
        down = f"{bytes_text((self._trained_down() - self._down) / status.asked)} down"
        each = f", {bytes_text(self._sent / len(came))} up and {down} each" if came else ""
        return f"round {status.server_round} of {status.rounds}: {len(came)} of {status.asked} clients{who}{each}"

    def _line(self, text: str) -> None:
        if not self._shown.live:
            self._shown.tell(text)

    def _bar(self) -> None:
        if self._shown.live:
            self._shown.show(*bar_of(self.status))


def bar_of(status: RunStatus) -> tuple[float, float, str]:
    """Rounds done, all rounds, and the words beside the bar, which fit 80 columns."""
    if status.state != "running":
        where = f"waiting for clients: {status.nodes} here" if status.state == "waiting" else status.state
        return status.server_round, status.rounds, where
    of_round = status.answers / status.asked if status.asked and status.server_round < status.rounds else 0.0
    parts = [f"round {min(status.server_round + 1, status.rounds)}/{status.rounds}"]
    parts += [f"{status.answers}/{status.asked} replies"] if status.asked else []
    parts += [f"loss {status.heldout_loss[-1]:.3f}"] if status.heldout_loss else []
    on_nodes = [*status.node_losses.values()][-1:]
    parts += [f"on the nodes {loss:.3f}" for loss in on_nodes]
    parts += [f"{bytes_text(status.payload_bytes / status.uplinks)} up each"] if status.uplinks else []
    parts += [f"{seconds_text(status.seconds_left)} left"] if status.seconds_left is not None else []
    return status.server_round + of_round, status.rounds, ", ".join(parts)


@contextmanager
def shown(events: EventLog) -> Iterator[None]:
    """Shows the run's events while the block runs."""
    with display() as one:
        events.listeners.append(RunView(one))
        yield
