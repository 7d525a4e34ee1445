"""Supervised children, with small programs in their place; and GPUs dealt to clients."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from client.gpus import deal_gpus
from client.preflight import check_server
from conf.processes import Child, end_all
from server.host.keys import make_keys


def child(tmp_path: Path, code: str, **options: object) -> Child:
    return Child("it", [sys.executable, "-c", code], tmp_path / "log", dict(os.environ), **options)  # type: ignore[arg-type]


def watch_until(one: Child, done: Callable[[], bool], said: list[str]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        one.watch(said.append)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_child_is_started_again_and_all_its_children_end(tmp_path: Path) -> None:
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '100']); print(p.pid, flush=True); p.wait()"
    one = child(tmp_path, code)
    said: list[str] = []
    watch_until(one, lambda: (tmp_path / "log").exists() and bool((tmp_path / "log").read_text()), said)
    assert one.process is not None
    first = one.process.pid
    one.process.send_signal(signal.SIGKILL)
    watch_until(one, lambda: one.starts == 2 and len((tmp_path / "log").read_text().split()) == 2, said)
    assert one.process is not None
    assert one.process.pid != first
    assert "ended with status -9" in said[0]
    end_all([one])
    for pid in (tmp_path / "log").read_text().split():
        wait_for_end(int(pid))


def test_one_that_is_refused_at_its_first_start_says_why_and_is_not_tried_again(tmp_path: Path) -> None:
    one = child(tmp_path, "print('no such key'); exit(3)", may_refuse=True)
    with pytest.raises(ValueError, match="it ended with status 3: no such key"):
        watch_until(one, lambda: False, [])
    assert one.starts == 1


def test_one_that_keeps_failing_waits_longer_every_time(tmp_path: Path) -> None:
    one = child(tmp_path, "exit(1)")
    said: list[str] = []
    watch_until(one, lambda: one.starts == 4, said)
    assert [text.split()[-2] for text in said[:3]] == ["0", "1", "2"]
    end_all([one])


@pytest.fixture
def all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("all_gpus")
@pytest.mark.parametrize(("wanted", "dealt"), [("none", ["", ""]), ("0,1", ["0", "1"]), ("3,1,0", ["3", "1"])])
def test_gpus_are_dealt(wanted: str, dealt: list[str]) -> None:
    assert deal_gpus(wanted, 2) == dealt


@pytest.mark.usefixtures("all_gpus")
def test_a_client_may_have_several() -> None:
    assert deal_gpus("0,1,2,3", 2, per_client=2) == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="2 clients need 4 GPUs"):
        deal_gpus("0,1,2", 2, per_client=2)


@pytest.mark.usefixtures("all_gpus")
def test_too_few_gpus_are_named() -> None:
    with pytest.raises(ValueError, match="3 clients need 3 GPUs, and --gpus 0,1 gives 2"):
        deal_gpus("0,1", 3)
    with pytest.raises(ValueError, match="different numbers"):
        deal_gpus("0,0", 1)


@pytest.mark.parametrize(
    ("visible", "seen", "wanted", "dealt"),
    [
        ("2,3", 2, "all", ["2", "3"]),
        ("2, 3,5", 3, "2,0", ["5", "2"]),
        ("GPU-8932f937,GPU-1f5a", 2, "all", ["GPU-8932f937", "GPU-1f5a"]),
        ("4,5,-1,6", 2, "all", ["4", "5"]),
        ("", 0, "all", ["", ""]),
        ("2,3", 2, "none", ["", ""]),
    ],
)
def test_gpus_that_were_given_to_this_process_are_dealt_by_their_names(
    visible: str, seen: int, wanted: str, dealt: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: seen)
    assert deal_gpus(wanted, 2) == dealt


@pytest.mark.parametrize(("visible", "held"), [("2,3", 2), ("", 0), ("-1", 0)])
def test_gpus_that_this_process_was_not_given_are_named(
    visible: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=f"CUDA_VISIBLE_DEVICES={visible} holds {held} GPUs"):
        deal_gpus("0,2", 2)


def tls_server(folder: Path) -> int:
    """A TLS server on loopback with the folder's certificate; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def test_a_server_that_is_not_ours_is_refused_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other, old = tmp_path / "good", tmp_path / "other", tmp_path / "old"
    make_keys(good, [], 0)
    make_keys(other, [], 0)
    address = f"127.0.0.1:{tls_server(good)}"
    assert check_server(address, good / "ca.crt")
    with pytest.raises(ValueError, match="not from the CA of"):
        check_server(address, other / "ca.crt")
    with pytest.raises(ValueError, match="wants TLS"):
        check_server(address, None)
    with pytest.raises(ValueError, match="HOST:PORT"):
        check_server("here", None)

    class LongAgo(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> LongAgo:
            return cls(2020, 1, 1, tzinfo=tz)

    make_keys(old, [], 0)
    (old / "server.pem").unlink()
    (old / "server.key").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("server.host.keys.datetime.datetime", LongAgo)
        make_keys(old, [], 0)
    with pytest.raises(ValueError, match="has expired"):
        check_server(f"127.0.0.1:{tls_server(old)}", old / "ca.crt")


def test_a_server_without_tls_and_one_that_is_not_there(tmp_path: Path) -> None:
    make_keys(tmp_path, [], 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        answering = threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        answering.start()
        with pytest.raises(ValueError, match="speaks no TLS"):
            check_server(f"127.0.0.1:{port}", tmp_path / "ca.crt")
        answering.join()
    assert not check_server(f"127.0.0.1:{port}", tmp_path / "ca.crt")


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from conf.processes import Child\n"
        f"one = Child('it', ['sleep', '100'], Path({str(tmp_path / 'log')!r}), dict(os.environ)); one.start()\n"
        "print(one.process.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for_end(pid)
