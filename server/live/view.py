"""A snapshot of a run for a terminal: what stands where, in 80 columns or more. Text of peers is shown as it is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from conf.console import bytes_text, seconds_text
from server.live.watched import ClientSeen, FaultSeen, Loss, Snapshot

BLOCKS = " ▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "  ..::##"
"""For terminals that have no others."""
PLOT_LINES = 5
WIDEST_BAR = 8
"""Columns of one value."""
COLOURS = {
    "running": "green", "answered": "green", "finished": "green", "waiting": "yellow", "asked": "cyan",
    "resting": "yellow", "absent": "yellow", "no answer": "yellow", "stopped": "yellow",
    "failed": "red", "refused": "red", "dead": "red",
}  # fmt: skip


def picture(seen: Snapshot, console: Console, height: int | None = None) -> RenderableType:
    """The whole of it, at most ``height`` lines high; None: as high as it is."""
    encoding = (console.encoding or "").lower()
    blocks = BLOCKS if encoding.startswith("utf") else PLAIN_BLOCKS
    head = [_title(seen), *_facts(seen, console.width), *_ends(seen)]
    plot = _plot(seen, console.width, blocks)
    left = 1000 if height is None else height - len(head) - len(plot)
    num_faults = min(len(seen.faults), 10 if height is None else max(1, min(5, left // 3)))
    faults = _faults(seen.faults[:num_faults], seen)
    num_clients = max(1, left - len(faults) - 3)
    return Group(*head, *plot, _clients(seen, num_clients), *faults)


def bars(values: Sequence[float | None], width: int, blocks: str = BLOCKS, lines: int = PLOT_LINES) -> list[str]:
    """Values as columns of characters, the highest line first; None is a gap. Of more values than columns those are
    taken that lie evenly between the first and the last."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite or width < 1:
        return [""] * lines
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / max(1, width - 1))] for i in range(width)]
    least, span = min(finite), max(finite) - min(finite)
    steps, each = lines * (len(blocks) - 1), min(WIDEST_BAR, width // len(values))
    heights = [_height(value, least, span, steps) for value in values]
    drawn = []
    for line in reversed(range(lines)):
        full = [min(max(height - line * (len(blocks) - 1), 0), len(blocks) - 1) for height in heights]
        drawn.append("".join(_bar(blocks[one], each) for one in full))
    return drawn


def _bar(block: str, each: int) -> str:
    """With a gap to the next one where there is room."""
    return block * each if each < 3 else block * (each - 1) + " "


def _height(value: float | None, least: float, span: float, steps: int) -> int:
    """In steps of a block; what is there has one at least."""
    if value is None or not math.isfinite(value):
        return 0
    return 1 + round((value - least) / span * (steps - 1)) if span else steps // 2


def _title(seen: Snapshot) -> Text:
    title = Text(no_wrap=True, overflow="ellipsis")
    title.append(f" {seen.state} ", style=f"bold reverse {COLOURS.get(seen.state, '')}")
    title.append(f" {seen.label}  ", style="bold")
    title.append(seen.folder, style="dim")
    return title


def _facts(seen: Snapshot, width: int) -> list[Text]:
    done = seen.rounds_done / seen.rounds if seen.rounds else 0.0
    filled = round(min(1.0, done) * 20)
    left = "" if seen.seconds_left is None else f", {seconds_text(seen.seconds_left)} left"
    answers = f", {seen.answers} of {seen.asked} answers" if seen.asked and not seen.has_ended else ""
    rounds = f"[{'#' * filled}{'-' * (20 - filled)}] round {seen.rounds_done} of {seen.rounds} done{answers}"
    each = f", {bytes_text(seen.bytes_up / seen.uplinks)} a reply" if seen.uplinks else ""
    missed = f", {bytes_text(seen.bytes_missed)} of it missed before" if seen.bytes_missed else ""
    kinds = ", ".join(f"{times} {kind}" for kind, times in seen.kinds.items())
    lines = {
        "rounds": rounds,
        "time": f"{seconds_text(seen.seconds)}{left}; last event at {_clock(seen.updated)}",
        "bytes": f"{bytes_text(seen.bytes_up)} up{each}; {bytes_text(seen.bytes_down)} down{missed}",
        "nodes": f"{seen.nodes} here; faults: {f'{seen.num_faults} ({kinds})' if kinds else 'none'}",
    }
    return [_line(f"{name:<7}{text}") for name, text in lines.items()]


def _ends(seen: Snapshot) -> list[Text]:
    said = [seen.reason, seen.what_now]
    return [Text(text, style="bold") for text in said if text]


def _plot(seen: Snapshot, width: int, blocks: str) -> list[Text]:
    losses = seen.losses or seen.node_losses  # a server without a base model has none of its own
    known = [loss for _, loss in losses if loss is not None]
    if not known:
        return [_line("held-out loss: none yet")]
    drawn = bars([loss for _, loss in losses], width - 12, blocks)
    labels = [f"{max(known):.4f}", *[""] * (len(drawn) - 2), f"{min(known):.4f}"]
    head = [_line(f"held-out loss {_course(seen.losses)}")] if seen.losses else []
    if seen.node_losses:
        worst = f", worst {seen.worst_client}" if seen.worst_client else ""
        head.append(_line(f"loss on nodes {_course(seen.node_losses)}{worst}"))
    return [*head, *(_line(f"{label:>10}  {bar}", "cyan") for label, bar in zip(labels, drawn, strict=True))]


def _course(losses: Sequence[Loss]) -> str:
    (first, before), (last, after) = losses[0], losses[-1]
    return f"{_loss_text(before)} -> {_loss_text(after)}, after rounds {first} to {last}"


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _clients(seen: Snapshot, most: int) -> RenderableType:
    if seen.are_secret:
        return _line("Who takes part is drawn in secret in this run, and shown to nobody.")
    if not seen.clients:
        return _line("No client has been asked yet.")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("partition", "state", "round", "answered", "faults", "last answer", "up", "down"):
        table.add_column(
            name, justify="left" if name == "state" else "right", no_wrap=True, overflow="ellipsis", header_style="bold"
        )
    kept = sorted(sorted(seen.clients, key=lambda one: (one.is_well, one.partition))[:most], key=_partition)
    for one in kept:
        table.add_row(*_cells(one, seen))
    left = len(seen.clients) + seen.clients_left_out - len(kept)
    return Group(table, _line(f"and {left:,} clients more, none of them worse")) if left else table


def _partition(one: ClientSeen) -> int:
    return one.partition


def _cells(one: ClientSeen, seen: Snapshot) -> list[Text]:
    state = f"rests to round {one.rests_until}" if one.rests_until else one.state
    ago = "-" if one.last_answer is None else f"{seconds_text(seen.now - one.last_answer)} ago"
    if seen.has_ended and one.last_answer is not None:
        ago = time.strftime("%H:%M:%S", time.localtime(one.last_answer))
    cells = [str(one.partition), state, str(one.last_round), f"{one.answered} of {one.asked}", str(one.faults), ago]
    cells += [bytes_text(one.bytes_up), bytes_text(one.bytes_down)]
    return [Text(cell, style=COLOURS.get(one.state, "") if i == 1 else "") for i, cell in enumerate(cells)]


def _faults(faults: Sequence[FaultSeen], seen: Snapshot) -> list[Text]:
    lines = [
        _line(
            f"{time.strftime('%H:%M:%S', time.localtime(one.time))} round {one.server_round}"
            f"{'' if one.partition is None else f', partition {one.partition}'}, {one.kind}: {one.reason}"
        )
        for one in faults
    ]
    lines += [_line(f"node {node} may not take part: {reason}") for node, reason in list(seen.refused.items())[-2:]]
    return [Text("last faults", style="bold"), *lines] if lines else []


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds)) if seconds else "-"
