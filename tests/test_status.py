"""What an operator sees: a run's events, whether it lives, which is the latest, and text that nobody can abuse."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.console import Display, is_live, printable, seconds_text
from conf.output import OutputError, open_output, replace_file, write_json
from server.live.progress import RunView, bar_of
from server.live.status import Watcher, show_status, table
from server.records.alive import DEAD_SECONDS, HEARTBEAT, LOCK, BusyError, alive, check_free, is_alive, read_heartbeat
from server.records.events import LONGEST_LINE, EventLog, EventReader, RunStatus, read_status
from server.records.places import CHECKPOINT, continuation, found, latest, remember
from strategies.outcomes import DOWNLINK_BYTES

HOSTILE = "\x1b]0;owned\x07[/usr/lib/foo][bold]\x9b31m\r\n\u202eabc"


def write_run(folder: Path, *, ended: bool = False) -> EventLog:
    folder.mkdir(parents=True, exist_ok=True)
    log = EventLog(folder)
    log.write("run_started", arm="coded", codec="identity", rounds=2, run_id="abc")
    log.write("nodes", count=2)
    log.write("evaluated", server_round=0, heldout_loss=3.5)
    log.write("round_started", server_round=1, clients=2)
    for partition in (0, 1):
        sizes = dict.fromkeys(DOWNLINK_BYTES, 500)
        log.write("downlink", server_round=1, partition=partition, **sizes)
        log.write("uplink", server_round=1, partition=partition, payload_bytes=1500)
    log.write("round_finished", server_round=1)
    log.write("evaluated", server_round=1, heldout_loss=3.25)
    if ended:
        log.write("run_finished", seconds=1.0)
    return log


def rendered(folder: Path, status: RunStatus, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table(folder, status))
    return out.getvalue()


class Lines(Display):
    """Keeps what would be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def tell(self, text: str) -> None:
        self.lines.append(text)


def test_printable_text_is_one_line_without_controls_and_cut() -> None:
    assert printable(HOSTILE) == "]0;owned[/usr/lib/foo][bold]31m  abc"
    assert printable("Größe 日本") == "Größe 日本"
    assert len(printable("x" * 101_000_000)) == 500
    assert printable("x" * 500) == "x" * 500
    assert printable("\x00" * 10_000).isprintable()


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"time": 1, "event": "fault", "reason": ' + "[" * 50_000 + "]" * 50_000 + "}",
        '{"time": NaN, "event": "nodes", "count": 1}',
        '{"time": 1e999, "event": "nodes", "count": 1}',
        '{"time": true, "event": "nodes", "count": 1}',
        '{"time": 1, "event": ["nodes"], "count": 1}',
        '{"time": 1, "event": "nodes", "count": "many"}',
        '{"time": 1, "event": "nodes", "count": -5}',
        '{"time": 1, "event": "downlink", "step_bytes": 1' + "0" * 400 + "}",
        '{"time": 1, "event": "round_finished", "server_round": 1e300}',
        '{"time": 1, "event": "evaluated", "server_round": null, "heldout_loss": 1}',
        '{"time": 1, "event": "evaluated", "server_round": 1, "heldout_loss": "low"}',
        '{"time": 1, "event": "uplink", "payload_bytes": {}}',
        '{"time": 1, "event": "run_started", "arm": "dense"}',
        '{"time": 1}',
        "[1]",
        "null",
        '"',
        "\xff",
    ],
)
def test_a_line_that_is_no_event_of_ours_changes_nothing(tmp_path: Path, line: str) -> None:
    write_run(tmp_path)
    before = read_status(tmp_path)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(line.encode("latin-1", "replace") + b"\n")
    EventLog(tmp_path, keep=True).write("nodes", count=before.nodes)
    after = read_status(tmp_path)
    after.updated = before.updated
    assert after == before
    rendered(tmp_path, after)


def test_a_huge_line_is_left_out_and_the_next_is_read(tmp_path: Path) -> None:
    log = write_run(tmp_path)
    log.write("fault", partition=1, reason="x" * (3 * LONGEST_LINE))
    log.write("fault", partition=0, reason=HOSTILE)
    status = read_status(tmp_path)
    assert (status.faults, status.last_fault) == (1, f"partition 0: {printable(HOSTILE)}")
    shown = rendered(tmp_path / "[/x]", status, 200)
    assert "[/usr/lib/foo]" in shown and "[/x]" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_a_diverged_loss_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path).write("evaluated", server_round=2, heldout_loss=float("nan"))
    assert "3.5000 -> nan" in rendered(tmp_path, read_status(tmp_path))


def test_a_reader_takes_what_is_new_and_sees_that_the_file_was_replaced(tmp_path: Path) -> None:
    log = write_run(tmp_path)
    reader = EventReader(tmp_path)
    assert len(reader.new()) == 10
    assert reader.new() == []
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "ev')
        file.flush()
        assert reader.new() == []
        file.write('ent": "nodes", "count": 1}\n')
    assert [event["event"] for event in reader.new()] == ["nodes"]
    log = EventLog(tmp_path)
    log.write("run_started", arm="dense", rounds=1)
    assert [event["event"] for event in reader.new()] == ["run_started"]
    with pytest.raises(ValueError, match=r"holds no events\.jsonl"):
        EventReader(tmp_path / "nowhere").new()


def test_a_run_is_alive_while_its_process_holds_the_folder(tmp_path: Path) -> None:
    write_run(tmp_path)
    with alive(tmp_path, "abc"):
        beat = read_heartbeat(tmp_path)
        assert beat is not None and beat.here
        assert (beat.run_id, beat.pid) == ("abc", os.getpid())
        assert Watcher(tmp_path).status().state == "running"
        with pytest.raises(BusyError, match=f"run abc, process {os.getpid()} on") as busy:
            check_free(tmp_path)
        assert str(tmp_path) in str(busy.value)
        with pytest.raises(BusyError), alive(tmp_path, "other"):
            pytest.fail("two runs in one folder")
        assert (read_heartbeat(tmp_path) or beat).run_id == "abc"
    check_free(tmp_path)
    assert not is_alive(tmp_path)


def test_a_killed_run_is_dead_and_does_not_block_the_next(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / CHECKPOINT).touch()
    code = "import os, sys\nfrom pathlib import Path\nfrom server.records.alive import alive\n"
    code += "with alive(Path(sys.argv[1]), 'abc'): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    status = Watcher(tmp_path).status()
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert (status.state, status.server_round) == ("dead", 1)
    assert status.updated >= beat.time
    with pytest.raises(ValueError, match=f"its process is gone since .*resume={re.escape(str(tmp_path))}"):
        show_status(tmp_path, follow=True)
    with alive(tmp_path, "abc"):
        assert Watcher(tmp_path).status().state == "running"


def test_a_run_of_another_host_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    write_run(tmp_path)
    beat = {"time": time.time(), "run_id": "abc", "pid": 1, "host": "elsewhere"}
    (tmp_path / HEARTBEAT).write_text(json.dumps(beat))
    assert Watcher(tmp_path).status().state == "running"
    with pytest.raises(BusyError, match="on elsewhere"):
        check_free(tmp_path)
    (tmp_path / HEARTBEAT).write_text(json.dumps({**beat, "time": time.time() - DEAD_SECONDS - 1}))
    assert Watcher(tmp_path).status().state == "dead"


@pytest.mark.parametrize("content", ["", "[" * 4000, "null", "{}", '{"time": "x"}', '{"time": NaN}', "x" * 9999])
def test_a_broken_heartbeat_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / HEARTBEAT).write_text(content)
    assert read_heartbeat(tmp_path) is None
    assert not is_alive(tmp_path)


def test_a_finished_run_is_not_dead(tmp_path: Path) -> None:
    write_run(tmp_path, ended=True)
    assert Watcher(tmp_path).status().state == "finished"
    show_status(tmp_path, follow=True)


def test_the_latest_run_is_the_one_that_was_started_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no run was started from"):
        found("latest")
    for name, age in (("outputs/federate/a", 0.0), ("multirun/b", 100.0)):
        write_run(tmp_path / name)
        os.utime(tmp_path / name / "events.jsonl", (time.time() - age,) * 2)
    assert latest() == Path("outputs/federate/a")
    write_run(elsewhere := tmp_path / "elsewhere")
    remember(elsewhere)
    assert found("latest") == elsewhere
    (elsewhere / "events.jsonl").unlink()
    assert latest() == Path("outputs/federate/a")


def test_the_command_that_goes_on_can_be_pasted(tmp_path: Path) -> None:
    assert "start it again" in continuation(tmp_path)
    (folder := tmp_path / "a=b (é)").mkdir()
    (folder / CHECKPOINT).touch()
    command = re.search("`(.*)`", continuation(folder))
    assert command is not None
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command[1]}"], capture_output=True, text=True).stdout
    assert words.splitlines()[-1] == f"resume='{folder}'"


def test_without_a_terminal_there_is_one_line_a_round(tmp_path: Path) -> None:
    shown = Lines()
    log = EventLog(tmp_path)
    log.listeners.append(RunView(shown))
    log.write("run_started", arm="coded", codec="identity", rounds=2, run_id="abc")
    log.write("waiting", count=1, of=2)
    log.write("nodes", count=2)
    log.write("evaluated", server_round=0, heldout_loss=3.5)
    for partition in (0, 1):
        log.write("downlink", server_round=1, partition=partition, **dict.fromkeys(DOWNLINK_BYTES, 500))
    log.write("round_started", server_round=1, clients=2)
    log.write("uplink", server_round=1, partition=1, payload_bytes=1500)
    log.write("fault", server_round=1, partition=0, reason=HOSTILE)
    log.write("round_finished", server_round=1)
    log.write("round_started", server_round=2, clients=2)  # a deployment evaluates while nodes train
    log.write("evaluated", server_round=1, heldout_loss=3.25)
    assert shown.lines == [
        "coded (identity), 2 rounds",
        "waiting for clients: 1 of 2 are here",
        "2 clients are here",
        "round 0 of 2, held-out loss 3.5000",
        f"fault: partition 0: {printable(HOSTILE)}",
        "round 1 of 2: 1 of 2 clients (1), 1.5 KB up and 2.0 KB down each, held-out loss 3.2500, 0:00:00 left",
    ]


def test_the_bar_says_its_units_and_fits_80_columns() -> None:
    status = RunStatus(state="running", server_round=112, rounds=200, asked=50, answers=12, heldout_loss=[3.5])
    status.payload_bytes, status.uplinks = 3_050_000, 1000
    status._round_seconds = [100.0]
    done, total, text = bar_of(status)
    assert (round(done, 2), total) == (112.24, 200)
    assert text == "round 113/200, 12/50 replies, loss 3.500, 3.0 KB up each, 2:26:40 left"
    assert len(text) + 1 + 6 <= 80


def test_a_hostile_event_does_not_stop_the_view(tmp_path: Path) -> None:
    view = RunView(shown := Lines())
    events: list[dict[str, Any]] = [
        {"time": 1, "event": "uplink", "partition": [1], "payload_bytes": "x"},
        {"time": 1, "event": "evaluated"},
        {"time": 1, "event": "round_finished"},
        {"event": "fault"},
        {},
    ]
    for event in events:
        view(event)
    assert all(line.isprintable() for line in shown.lines)


@pytest.mark.parametrize("term", ["dumb", "", "unknown"])
def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", term)
    assert not is_live()
    monkeypatch.setenv("TERM", "xterm")
    assert is_live()


def test_any_number_is_a_time() -> None:
    assert [seconds_text(x) for x in (-1.0, 61.4, float("nan"))] == ["0:00:00", "0:01:01", "-"]
    assert seconds_text(float("inf")).endswith(":40")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json({"a": 1}, path)

    def full(part: Path) -> None:
        part.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"results\.json cannot be written: No space left on device"):
        replace_file(path, full)

    def full_in_words(part: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OutputError, match="No space left"):
        replace_file(path, full_in_words)

    def broken(part: Path) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        replace_file(path, broken)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file/out' cannot be written to: Not a directory"):
        open_output(tmp_path / "file" / "out")
    log = EventLog(tmp_path)
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"events\.jsonl cannot be written"):
        log.write("nodes", count=1)
    assert not (tmp_path / LOCK).exists()
