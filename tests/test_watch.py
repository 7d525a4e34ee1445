"""The live view of a run: what is folded from its events, on a terminal and as a page on loopback."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import WIDTHS, chromium, in_a_browser, opened
from conftest import InProcessGrid, RunProgram
from flwr.app import Message
from rich.console import Console
from test_federation import run, settings_for

import server.watch
from conf.checks import check_settings
from server.live.look import PAGE, POLICY
from server.live.page import LAST_SECONDS, MOST_THREADS, PageServer, is_own, serve_page
from server.live.view import bars, picture
from server.live.watched import OWN_WORDS, SHOWN_CLIENTS, SHOWN_FAULTS, SHOWN_LOSSES, RunWatch, Snapshot
from server.records.alive import HEARTBEAT, alive
from server.records.events import EventLog
from server.records.places import CHECKPOINT
from strategies.outcomes import DOWNLINK_BYTES

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;owned\x07[/x][bold red]\u202e"
SHOWN = "<script>alert(1)</script><img src=x onerror=alert(2)>]0;owned[/x][bold red]"


def ask(log: EventLog, server_round: int, *partitions: int, size: int = 500) -> None:
    for partition in partitions:
        sizes = dict.fromkeys(DOWNLINK_BYTES, size)
        log.write("downlink", server_round=server_round, partition=partition, **sizes)
    log.write("round_started", server_round=server_round, clients=len(partitions))


def answer(log: EventLog, server_round: int, *partitions: int) -> None:
    for partition in partitions:
        log.write("uplink", server_round=server_round, partition=partition, payload_bytes=1500)


def fail(log: EventLog, server_round: int, partition: int, kind: str, reason: str = "why", **more: Any) -> None:
    log.write("fault", server_round=server_round, partition=partition, kind=kind, reason=reason, node=7, **more)


def finish(log: EventLog, server_round: int, loss: float) -> None:
    log.write("round_finished", server_round=server_round)
    log.write("evaluated", server_round=server_round, heldout_loss=loss)


def write_run(folder: Path, **started: Any) -> EventLog:
    """Two rounds and a half: one is tried again, one client rests, one is away."""
    folder.mkdir(parents=True, exist_ok=True)
    log = EventLog(folder)
    log.write("run_started", arm="coded", codec="identity", rounds=4, run_id="abc", **started)
    log.write("nodes", count=4)
    log.write("evaluated", server_round=0, heldout_loss=3.5)
    ask(log, 1, 0, 1, 2)
    answer(log, 1, 0)
    fail(log, 1, 1, "failed", HOSTILE)
    ask(log, 1, 0, 1, 2)  # again
    answer(log, 1, 0, 2)
    fail(log, 1, 1, "refused", "too long; it failed 2 times in a row and rests for 3 rounds", rests_until=4)
    finish(log, 1, 3.25)
    ask(log, 2, 2, 3)
    fail(log, 2, 3, "absent")
    answer(log, 2, 2)
    log.write("node_refused", node=99, reason=HOSTILE)
    finish(log, 2, 3.125)
    ask(log, 3, 0, 2)
    answer(log, 3, 0)
    return log


@pytest.fixture
def living(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that is in its third round."""
    write_run(tmp_path / "run")
    with alive(tmp_path / "run", "abc"):
        yield tmp_path / "run"


def drawn(seen: Snapshot, width: int = 80, height: int | None = None) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=False)
    console.print(picture(seen, console, height))
    return out.getvalue().splitlines()


def test_what_is_seen_is_what_the_events_say(living: Path) -> None:
    seen = RunWatch(living).look()
    assert (seen.state, seen.label, seen.rounds, seen.rounds_done) == ("running", "coded (identity)", 4, 2)
    assert (seen.nodes, seen.asked, seen.answers) == (4, 2, 1)
    assert seen.losses == [(0, 3.5), (1, 3.25), (2, 3.125)]
    assert (seen.uplinks, seen.bytes_up, seen.bytes_down) == (5, 5 * 1500, 10 * 2000)
    assert seen.seconds_left is not None
    shown = {one.partition: (one.state, one.last_round, one.asked, one.answered, one.faults) for one in seen.clients}
    assert shown == {
        0: ("answered", 3, 3, 3, 0),
        1: ("resting", 1, 2, 0, 2),
        2: ("asked", 3, 4, 2, 0),
        3: ("absent", 2, 1, 0, 1),
    }
    assert [one.rests_until for one in seen.clients] == [0, 4, 0, 0]
    assert [(one.bytes_up, one.bytes_down) for one in seen.clients] == [
        (4500, 6000), (0, 4000), (3000, 8000), (0, 2000)
    ]  # fmt: skip
    assert [one.last_answer is None for one in seen.clients] == [False, True, False, True]
    assert (seen.num_faults, seen.kinds) == (3, {"failed": 1, "refused": 1, "absent": 1})
    assert [(one.server_round, one.partition, one.kind) for one in seen.faults] == [
        (2, 3, "absent"), (1, 1, "refused"), (1, 1, "failed")
    ]  # fmt: skip
    assert seen.faults[-1].reason == SHOWN and seen.refused == {"99": SHOWN}


def test_who_rested_is_asked_again(living: Path) -> None:
    log = EventLog(living, keep=True)
    finish(log, 3, 3.0)
    ask(log, 4, 1)  # all rest: all are awake
    assert {one.partition: one.state for one in RunWatch(living).look().clients}[1] == "asked"
    answer(log, 4, 1)
    finish(log, 4, 3.0)
    states = {one.partition: one.state for one in RunWatch(living).look().clients}
    assert states == {0: "answered", 1: "answered", 2: "no answer", 3: "absent"}


def test_a_dead_run_says_what_goes_on_with_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / CHECKPOINT).touch()
    seen = RunWatch(tmp_path).look()
    assert (seen.state, seen.seconds_left) == ("dead", None)
    assert f"resume={tmp_path}" in seen.what_now
    assert {one.partition: one.state for one in seen.clients}[2] == "no answer"
    assert any("python -m server.federate" in line for line in drawn(seen))


@pytest.mark.parametrize(
    ("event", "state"), [("run_finished", "finished"), ("run_stopped", "stopped"), ("run_failed", "failed")]
)
def test_an_ended_run_is_shown_as_it_ended(tmp_path: Path, event: str, state: str) -> None:
    write_run(tmp_path).write(event, reason="no room", seconds=3.0)
    seen = RunWatch(tmp_path).look()
    assert (seen.state, seen.reason) == (state, "no room" if state == "failed" else "")
    assert seen.has_ended and f" {state} " in drawn(seen)[0]


def test_a_run_is_followed_and_another_in_its_folder_begins_anew(living: Path) -> None:
    watch = RunWatch(living)
    assert watch.look().rounds_done == 2
    log = EventLog(living, keep=True)
    answer(log, 3, 2)
    finish(log, 3, 3.0)
    seen = watch.look()
    assert (seen.rounds_done, seen.losses[-1], seen.uplinks) == (3, (3, 3.0), 6)
    log = EventLog(living)
    log.write("run_started", arm="dense", rounds=1, run_id="def")
    seen = watch.look()
    assert (seen.label, seen.rounds_done, seen.uplinks, seen.losses, seen.clients) == ("dense", 0, 0, [], [])


def test_losses_on_nodes_are_seen_and_ask_for_no_update(living: Path) -> None:
    log = EventLog(living, keep=True)
    before = RunWatch(living).look()
    sizes = dict.fromkeys(DOWNLINK_BYTES, 5)
    log.write("downlink", server_round=2, partition=3, evaluating=True, **sizes)
    log.write("downlink", server_round=2, partition=0, evaluating=True, **sizes)
    fail(log, 2, 0, "failed", "no windows", evaluating=True)
    log.write("evaluated_on_nodes", server_round=2, asked=2, clients=1, loss=3.4, worst=3.75, worst_client=3)
    seen = RunWatch(living).look()
    assert (seen.node_losses, seen.worst_client) == ([(2, 3.4)], "3.7500 (client 3)")
    assert (seen.faults[0].reason, seen.num_faults) == ("no windows", 4)
    told = [(one.state, one.last_round, one.asked, one.faults, one.bytes_down) for one in before.clients]
    assert [(one.state, one.last_round, one.asked, one.faults) for one in seen.clients] == [one[:4] for one in told]
    assert [one.bytes_down for one in seen.clients] == [told[0][4] + 20, told[1][4], told[2][4], told[3][4] + 20]
    said = "\n".join(drawn(seen))
    assert "held-out loss 3.5000 -> 3.1250" in said and "loss on nodes 3.4000 -> 3.4000" in said


def test_a_secret_draw_is_kept(tmp_path: Path) -> None:
    write_run(tmp_path, withheld=["who", "words"])
    seen = RunWatch(tmp_path).look()
    assert seen.are_secret and not seen.clients and not seen.faults
    assert (seen.num_faults, seen.kinds["refused"]) == (3, 1)
    said = "\n".join(drawn(seen))
    assert "drawn in secret" in said and "partition 1" not in said


def test_what_clients_say_of_protected_data_is_kept(tmp_path: Path) -> None:
    write_run(tmp_path, withheld=["words"])
    reasons = [one.reason for one in RunWatch(tmp_path).look().faults]
    assert reasons[0] == "why" and reasons[1].startswith("too long") and reasons[2] == OWN_WORDS


@pytest.mark.parametrize(
    "event",
    [
        {"event": "run_resumed", "arm": "dense", "rounds": 1, "withheld": 5},
        {"event": "uplink", "server_round": 1, "partition": -1, "payload_bytes": 1},
        {"event": "uplink", "server_round": 1, "partition": "0", "payload_bytes": 1},
        {"event": "uplink", "server_round": 1, "partition": 10**30, "payload_bytes": 1},
        {"event": "downlink", "server_round": 1, "partition": 0},
        {"event": "fault", "server_round": None, "partition": 0, "reason": "x"},
        {"event": "fault", "server_round": 1, "partition": 0, "reason": "x", "rests_until": "ever"},
        {"event": "round_started", "clients": 1, "server_round": []},
        {"event": ["fault"]},
        {"event": "node_refused", "reason": "x"},
    ],
)
def test_an_event_that_is_none_of_ours_changes_no_client(living: Path, event: dict[str, Any]) -> None:
    before = RunWatch(living).look()
    with (living / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **event}) + "\n")
    after = RunWatch(living).look()
    assert (after.clients, after.faults, after.refused) == (before.clients, before.faults, before.refused)
    drawn(after)


def test_words_of_peers_are_words(living: Path) -> None:
    fail(EventLog(living, keep=True), 3, 2, HOSTILE, HOSTILE)
    lines = drawn(RunWatch(living).look(), width=160)
    assert any(SHOWN in line and "failed:" in line for line in lines)  # a kind of its own is none
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e]", "".join(lines))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 50), (100, 30), (60, 24)])
def test_the_picture_fits_its_terminal(living: Path, width: int, height: int) -> None:
    log = EventLog(living, keep=True)
    for partition in range(4, 104):
        ask(log, 3, partition)
        fail(log, 3, partition, "failed", "x" * 400)
    lines = drawn(RunWatch(living).look(), width, height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    assert any(line.startswith("and ") and "clients more" in line for line in lines)


def test_values_become_bars() -> None:
    assert bars([1.0, 0.0], 4, lines=1) == ["██▁▁"]
    assert bars([1.0, None, float("nan"), 1.0], 4, lines=1) == ["▄  ▄"]
    assert bars([8.0, 4.5, 1.0], 3, lines=2) == ["█▁ ", "██▁"]
    assert bars([float(i) for i in range(1000)], 8, lines=1) == ["▁▂▃▄▅▆▇█"]
    assert bars([], 8, lines=2) == ["", ""]


def test_a_diverged_loss_is_seen(living: Path) -> None:
    EventLog(living, keep=True).write("evaluated", server_round=3, heldout_loss=float("inf"))
    seen = RunWatch(living).look()
    assert seen.losses[-1] == (3, None)
    assert "3.5000 -> not finite" in "\n".join(drawn(seen))
    json.dumps(seen.to_json(), allow_nan=False)


def test_a_long_log_makes_no_long_answer(tmp_path: Path) -> None:
    """100,000 events, of more partitions than are kept apart."""
    with (tmp_path / "events.jsonl").open("w", encoding="utf-8") as file:
        file.write('{"time": 1, "event": "run_started", "arm": "dense", "rounds": 9999, "run_id": "a"}\n')
        for i in range(25_000):
            file.write(f'{{"time": 2, "event": "downlink", "server_round": {i}, "partition": {i}, "step_bytes": 1, ')
            file.write('"catch_up_bytes": 0, "snapshot_bytes": 0, "side_bytes": 0}\n')
            what = f'"server_round": {i}, "partition": {i}'
            reason = "é" * (900 if i > 24_900 else 9)
            file.write(f'{{"time": 2, "event": "fault", {what}, "kind": "failed", "reason": "{reason}"}}\n')
            file.write(f'{{"time": 3, "event": "round_finished", "server_round": {i}}}\n')
            file.write(f'{{"time": 3, "event": "evaluated", "server_round": {i}, "heldout_loss": {i}}}\n')
    seen = RunWatch(tmp_path).look()
    assert (len(seen.clients), seen.clients_left_out) == (SHOWN_CLIENTS, 10_000 - SHOWN_CLIENTS)
    assert (len(seen.faults), seen.num_faults, seen.bytes_down) == (SHOWN_FAULTS, 25_000, 25_000)
    assert (len(seen.losses), seen.losses[0], seen.losses[-1]) == (SHOWN_LOSSES, (0, 0.0), (24_999, 24_999.0))
    assert len(json.dumps(seen.to_json())) < 200_000


# the program


def test_without_a_terminal_it_is_printed_once(living: Path, run_program: RunProgram) -> None:
    status, out, _ = run_program(server.watch.main, [str(living)])
    assert status == 0
    assert "round 2 of 4 done, 1 of 2 answers" in out and "rests to round 4" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere holds no events.jsonl"),
        (["--every", "0"], "--every=0.0 must lie between 0.1 and 3600"),
        (["--every", "nan"], "--every=nan"),
        (["{run}", "--page", "0"], "--page=0 must lie between 1 and 65535"),
        (["{run}", "--page", "65536"], "--page=65536"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    living: Path, run_program: RunProgram, arguments: list[str], reason: str
) -> None:
    status, _, err = run_program(server.watch.main, [argument.format(run=living) for argument in arguments])
    assert status == 1
    assert err.startswith("error: ") and reason in err and len(err.splitlines()) == 1


def test_on_a_terminal_it_is_redrawn_until_ctrl_c(living: Path) -> None:
    """In a process of its own, which has loaded no engine."""
    ours, theirs = pty.openpty()
    ctrl_c = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # which what runs in the background ignores
    code = f"import signal, sys; {ctrl_c}; import server.watch as w; w.main()"
    code += "; print('torch' in sys.modules, 'flwr' in sys.modules)"
    command = [sys.executable, "-c", code, str(living), "--every", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        out, log = b"", EventLog(living, keep=True)
        while b"round 2 of 4" not in out:
            out += os.read(ours, 4096)
        answer(log, 3, 2)
        finish(log, 3, 3.0)
        while b"round 3 of 4" not in out:
            out += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # it has ended
            while more := os.read(ours, 4096):
                out += more
        assert process.wait(30) == 0
    os.close(ours)
    assert b"\x1b[?1049h" in out and b"\x1b[?1049l" in out  # a screen of its own, and back
    assert out.rstrip().endswith(b"False False")


# the page


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    page = PageServer(0, folder)
    thread = threading.Thread(target=page.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield page.server_port
    finally:
        page.shutdown()
        page.server_close()
        thread.join()


def got(
    port: int, path: str = "/status.json", method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_the_page_and_its_values_are_served(living: Path) -> None:
    with served(living) as port:
        status, headers, page = got(port, "/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["Content-Security-Policy"] == POLICY and "default-src 'none'" in POLICY
        assert (headers["X-Content-Type-Options"], headers["X-Frame-Options"]) == ("nosniff", "DENY")
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not re.search(rb"(src|href)=\"?(http|//)", page) and b"Python" not in headers["Server"].encode()
        status, headers, content = got(port)
        assert status == 200 and headers["Content-Type"] == "application/json"
        values = json.loads(content)
        expected = json.loads(json.dumps(RunWatch(living).look().to_json()))
        for changing in ("now", "seconds"):
            del values[changing], expected[changing]
        assert values == expected


def test_every_colour_of_the_page_is_defined() -> None:
    """Most of them are those of reports."""
    used, defined = (set(re.findall(pattern, PAGE)) for pattern in (r"var\((--\w+)\)", r"(--\w+):"))
    assert used and used <= defined


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "get", "BREW"])
def test_other_methods_are_refused(living: Path, method: str) -> None:
    with served(living) as port:
        status, headers, content = got(port, "/", method)
        assert (status, headers["Allow"]) == (405, "GET")
        assert content == (b"" if method == "HEAD" else b"405 Method Not Allowed\n")


@pytest.mark.parametrize(
    "path", ["/events.jsonl", "/..", "/../etc/passwd", "/%2e%2e/", "/status.json/", "/?x", "/a<b>"]
)
def test_other_paths_are_not_there(living: Path, path: str) -> None:
    with served(living) as port:
        status, _, content = got(port, path)
        assert (status, content) == (404, b"404 Not Found\n")


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("localhost:8080", True),
        ("LocalHost:1", True),
        ("[::1]:8080", True),
        ("[::1]", True),
        ("evil.example", False),
        ("evil.example:8080", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8080", False),
        ("localhost:8080:8080", False),
        ("localhost:", False),
        ("localhost:x", False),
        ("", False),
    ],
)
def test_only_names_of_this_host_are_answered_to(host: str, own: bool) -> None:
    assert is_own(host) is own


def test_who_asks_by_another_name_gets_nothing(living: Path) -> None:
    with served(living) as port:
        assert got(port, host="evil.example")[::2] == (421, b"421 Misdirected Request\n")
        assert got(port, host=f"localhost:{port}")[0] == 200
        for request in (b"GET /status.json HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.sendall(request)
                assert connection.recv(100).startswith(b"HTTP/1.0 421 ")


@pytest.mark.parametrize(
    "request_", [b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000 + b"\r\n"]
)
def test_nonsense_ends_no_server(living: Path, request_: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with served(living) as port:
        with socket.create_connection(("127.0.0.1", port), 20) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(request_)
            connection.recv(1000)
        assert got(port)[0] == 200
    assert capfd.readouterr().err == ""


def test_many_who_wait_are_turned_away_and_keep_nobody_out_for_long(living: Path) -> None:
    with served(living) as port, contextlib.ExitStack() as idle:
        threads = threading.active_count()
        for _ in range(MOST_THREADS + 4):
            idle.enter_context(socket.create_connection(("127.0.0.1", port), 20))
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            got(port)
        assert threading.active_count() - threads <= MOST_THREADS
        idle.close()
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                assert got(port)[0] == 200
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_it_listens_on_loopback_alone(living: Path) -> None:
    page = PageServer(0, living)
    try:
        assert page.server_address[0] == "127.0.0.1"
    finally:
        page.server_close()


def test_a_run_that_has_written_nothing_yet_is_starting(tmp_path: Path) -> None:
    with served(tmp_path) as port:
        assert json.loads(got(port)[2])["state"] == "starting"
        write_run(tmp_path)
        time.sleep(0.6)
        assert json.loads(got(port)[2])["rounds_done"] == 2
        (tmp_path / "events.jsonl").unlink()
        time.sleep(0.6)
        assert json.loads(got(port)[2])["state"] == "starting"


def test_a_port_that_is_taken_is_said_before_any_work(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        settings = settings_for(tmp_path, "run", arm="dense", federation__page_port=port)
        with pytest.raises(
            ValueError, match=rf"federation\.page_port={port} cannot be served: .*; choose another port"
        ):
            run(settings, tmp_path)
        assert [event["event"] for event in map(json.loads, (tmp_path / "run/events.jsonl").open())] == ["run_failed"]


def test_one_port_serves_one_thing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"federation\.page_port=9000 is federation\.metrics_port as well"):
        check_settings(settings_for(tmp_path, "run", federation__page_port=9000, federation__metrics_port=9000))


@contextlib.contextmanager
def polled(port: int) -> Iterator[list[dict[str, Any]]]:
    """What somebody sees who asks again and again, as a browser does."""
    seen, gone = list[dict[str, Any]](), threading.Event()

    def poll() -> None:
        while not gone.wait(0.1):
            with contextlib.suppress(OSError, http.client.HTTPException):
                seen.append(json.loads(got(port)[2]))

    poller = threading.Thread(target=poll, daemon=True)
    poller.start()
    try:
        yield seen
    finally:
        gone.set()
        poller.join()


def test_who_looks_sees_why_a_run_failed(living: Path) -> None:
    """As ``server.run.federation`` has it: the page is shut after the failure is told."""
    port, log = free_port(), EventLog(living, keep=True)

    def fail_when_seen(seen: list[dict[str, Any]]) -> None:
        with contextlib.ExitStack() as page, log.telling_failure():
            page.enter_context(serve_page(port, living))
            while not seen:
                time.sleep(0.05)
            raise ValueError("no room")

    with polled(port) as seen, pytest.raises(ValueError, match="no room"):
        fail_when_seen(seen)
    assert (seen[0]["state"], seen[-1]["state"], seen[-1]["reason"]) == ("running", "failed", "no room")


def test_a_run_is_watched_and_shows_its_end(tmp_path: Path) -> None:
    """Who polls the page sees the rounds, and the end before the page goes."""
    port = free_port()

    class WatchedGrid(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            time.sleep(0.6)
            return super().push_messages(messages)

    settings = settings_for(tmp_path, "run", arm="dense", federation__page_port=port, federation__rounds=2)
    with polled(port) as seen:
        results = run(settings, tmp_path, WatchedGrid)
    assert {"running", "finished"} <= {one["state"] for one in seen}
    last = seen[-1]
    assert (last["state"], last["rounds_done"], last["label"]) == ("finished", 2, "dense")
    assert [loss for _, loss in last["losses"]] == results.heldout_loss
    assert last["bytes_up"] == sum(uplink.payload_bytes for uplink in results.uplinks)
    assert last["bytes_down"] == sum(downlink.total_bytes for downlink in results.downlinks)
    assert sum(one["answered"] for one in last["clients"]) == 4
    with pytest.raises(ConnectionError):
        got(port)


def test_nobody_is_waited_for_who_does_not_look(living: Path) -> None:
    began = time.monotonic()
    with serve_page(free_port(), living):
        pass
    assert time.monotonic() - began < LAST_SECONDS


@in_a_browser
def test_a_browser_shows_the_run_and_follows_it(living: Path) -> None:
    fail(EventLog(living, keep=True), 3, 2, "failed", HOSTILE)
    with served(living) as port, chromium() as browser:
        for width in WIDTHS:
            for light in ("light", "dark"):
                page, said, asked = opened(browser, f"http://127.0.0.1:{port}/", width, light)
                page.wait_for_selector("html[data-updates]")
                check_page(page, json.loads(got(port)[2]), width)
                page.locator("summary").click()
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                background = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert background == ("rgb(255, 255, 255)" if light == "light" else "rgb(20, 23, 28)")
                assert said == [] and {address.rpartition(str(port))[2] for address in asked} == {"/", "/status.json"}
                page.context.close()
        page, said, _ = opened(browser, f"http://localhost:{port}/")
        page.wait_for_selector("html[data-updates]")
        log = EventLog(living, keep=True)
        finish(log, 3, 2.875)
        page.wait_for_selector("#rounds:text-is('3 of 4')")
        assert page.locator("#plot circle").count() == 4
        assert page.locator("#news").text_content() == "Run running, 3 of 4 rounds done, held-out loss 2.8750"
        log.write("run_finished", seconds=1.0)
        page.wait_for_selector("#state:text-is('finished')")
        assert said == []
        check_page(page, json.loads(got(port)[2]), 1440)


def check_page(page: Any, values: dict[str, Any], width: int) -> None:
    """What stands on the page is what the JSON says, and hostile words are words."""
    text = page.locator("main").inner_text()
    assert page.locator("#rounds").text_content() == f"{values['rounds_done']} of {values['rounds']}"
    assert page.locator("#loss").text_content() == f"{values['losses'][-1][1]:.4f}"
    assert page.locator("#num-faults").text_content() == str(values["num_faults"])
    assert page.locator("#up").text_content() == "7.5 KB" and values["bytes_up"] == 7500
    rows = [row.locator("th, td").all_text_contents() for row in page.locator("#clients tr").all()]
    expected = [
        [
            str(one["partition"]),
            f"rests to round {one['rests_until']}" if one["rests_until"] else one["state"],
            str(one["last_round"]),
            f"{one['answered']} of {one['asked']}",
            str(one["faults"]),
        ]
        for one in values["clients"]
    ]
    assert [row[:5] for row in rows] == expected
    assert page.locator("#faults .why").first.text_content() == SHOWN and SHOWN in text
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.locator("#clients-table thead th[scope=col]").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@in_a_browser
def test_a_browser_says_that_the_page_has_gone(living: Path) -> None:
    with chromium() as browser:
        with served(living) as port:
            page, _, _ = opened(browser, f"http://127.0.0.1:{port}/")
            page.wait_for_selector("html[data-updates]")
        page.wait_for_selector("#lost:visible")
        assert "python -m server.watch" in page.locator("#lost").text_content()
        assert page.locator("#rounds").text_content() == "2 of 4"


def test_a_run_of_another_host_is_shown_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    write_run(tmp_path)
    beat = {"time": time.time(), "run_id": "abc", "pid": 1, "host": "elsewhere"}
    (tmp_path / HEARTBEAT).write_text(json.dumps(beat))
    assert RunWatch(tmp_path).look().state == "running"
