"""A run's page on loopback: ``/`` is the page, ``/status.json`` a snapshot of the run, and there is nothing else.

For who has an account on this host, or a tunnel to it: read only, and it says nothing that ``events.jsonl`` does not.
A browser may be made to ask it by a page from elsewhere: the name that it was asked by must be one of this host's own,
and no other page may read, frame or embed an answer. It runs in threads of its own, a few at most, and reads the run's
folder only when it is asked, so that no run waits for it or ends with it.
"""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from conf.console import printable
from server.live.look import PAGE, POLICY
from server.live.watched import RunWatch, Snapshot

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""By which the page may be asked for, with any port: a tunnel may have another."""
MOST_THREADS = 16
"""Who comes while so many are served is turned away."""
PATIENCE_SECONDS = 5.0
"""For a request to come in."""
LEAST_SECONDS = 0.5
"""Between two looks at the folder, however many ask."""
WATCHED_SECONDS = 8.0
"""Who has asked since then is taken to look at the page."""
LAST_SECONDS = 3.0
"""At most, for who looks at the page to see how the run ended."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Looks:
    """Snapshots of a run as JSON, for many who ask at the same time."""

    def __init__(self, folder: Path) -> None:
        self.told_end = threading.Event()  # somebody has got a snapshot of the run that has ended
        self.asked = 0.0  # when last, by the clock that only goes on
        self._folder = folder
        self._lock = threading.Lock()
        self._watch: RunWatch | None = None
        self._last = b""
        self._has_ended = False
        self._looked = 0.0

    def json(self) -> bytes:
        """The last look, or a new one."""
        with self._lock:
            self.asked = time.monotonic()
            if not self._last or self.asked - self._looked >= LEAST_SECONDS:
                seen = self._look()
                self._last = json.dumps(seen.to_json(), allow_nan=False).encode()
                self._has_ended, self._looked = seen.has_ended, time.monotonic()
            (self.told_end.set if self._has_ended else self.told_end.clear)()
            return self._last

    def _look(self) -> Snapshot:
        try:
            if self._watch is None:
                self._watch = RunWatch(self._folder)
            return self._watch.look()
        except ValueError:  # no log yet, or none any more
            self._watch = None
            return Snapshot(printable(self._folder), round(time.time(), 3), "starting")


class PageServer(socketserver.ThreadingMixIn, HTTPServer):
    """Bound to loopback, with a bounded number of threads, none of which keeps the process."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MOST_THREADS

    def __init__(self, port: int, folder: Path) -> None:
        """Raises OSError: the port is not to be had."""
        self.looks = Looks(folder)
        self._free = threading.BoundedSemaphore(MOST_THREADS)
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        """Without asking a resolver for this host's name, as the library's does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was to be had
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asks and goes away, or asks for nonsense, is no matter for the run's log."""


class _Handler(BaseHTTPRequestHandler):
    """One request a connection; answers say nothing of what was asked."""

    server: PageServer
    timeout = PATIENCE_SECONDS
    server_version, sys_version = "cg-fedllm", ""

    def do_GET(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_own(hosts[0]):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.encode())
        elif self.path == "/status.json":
            self._answer(HTTPStatus.OK, "application/json", self.server.looks.json())
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """A line of text. The library's 501, of a method that we have not, is 405."""
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._answer(status, "text/plain; charset=utf-8", f"{status.value} {status.phrase}\n".encode())

    def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def is_own(host: str) -> bool:
    """Whether a Host header names this host as itself: a name of somebody's that leads here does not."""
    name, _, port = host.strip().lower().rpartition(":")
    if not name or host.strip().endswith("]"):  # no port
        name, port = host.strip().lower(), "0"
    return name in NAMES and port.isascii() and port.isdigit() and len(port) <= 5


@contextlib.contextmanager
def serve_page(port: int | None, folder: Path, key: str = "federation.page_port") -> Iterator[None]:
    """Serves ``http://127.0.0.1:port/`` while the block runs, and for a moment more if somebody is looking: how a run
    ended is worth seeing. None: nothing.

    Args:
        port: on loopback.
        folder: of the run; its log may come later.
        key: what the port was given as.

    Raises:
        ValueError: the port is taken.
    """
    if port is None:
        yield
        return
    try:
        server = PageServer(port, folder)
    except OSError as error:
        raise ValueError(
            f"{key}={port} cannot be served: {error.strerror}; choose another port, or end what listens there"
        ) from None
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="page", daemon=True)
    thread.start()
    try:
        yield
        _let_see(server.looks)
    except Exception:
        _let_see(server.looks)
        raise
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _let_see(looks: Looks) -> None:
    if looks.asked and time.monotonic() - looks.asked < WATCHED_SECONDS:
        looks.told_end.wait(LAST_SECONDS)
