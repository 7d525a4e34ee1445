"""Long-lived child processes: started, watched, started again when they die, and ended together.

What both hosts have in common: the server keeps a SuperLink and its executor alive, a node its SuperNodes and
trainers. Knows processes; must not know Flower.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STABLE_SECONDS = 60.0
"""A child that lived so long is started again at once; one that dies sooner waits longer every time."""
LONGEST_WAIT = 30.0
LATER_PATIENCE = 8
"""How often in a row a child that was up once may be refused: about two minutes."""
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """One program that should always run."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    folder: Path | None = None
    may_refuse: bool = False  # an exit with an error soon after the first start is final; a kill never is
    explain: Callable[[Path], str] = lambda log: ""  # what its log says of why it ended
    umask: int = -1  # of the files that it makes; -1: as ours
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _short_lives: int = field(default=0, repr=False)
    _started: float = field(default=0.0, repr=False)
    _next_start: float = field(default=0.0, repr=False)

    def start(self) -> None:
        # a file, not a pipe: a grandchild that outlives it would keep a pipe open. A session of its own, so that
        # Ctrl-C reaches the parent alone, and so that all that it started ends with it.
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=dict(self.environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=self.umask,
                preexec_fn=_end_with_parent,
            )
        self._started = time.monotonic()
        self.starts += 1

    def watch(self, report: Callable[[str], None]) -> None:
        """Starts it, and starts it again if it died. Raises ValueError: it fails for good."""
        now = time.monotonic()
        if self.process is not None:
            status = self.process.poll()
            if status is None:
                return
            self._short_lives = 0 if now - self._started > STABLE_SECONDS else self._short_lives + 1
            why = f"{self.name} ended with status {status}: {self.explain(self.log) or last_line(self.log)}"
            never_up = self._short_lives == self.starts
            if self.may_refuse and status > 0 and (never_up or self._short_lives > LATER_PATIENCE):
                raise ValueError(f"{why} (log: {self.log})")
            wait = 0.0 if self._short_lives <= 1 else min(2.0 ** (self._short_lives - 2), LONGEST_WAIT)
            report(f"{why}; starting it again in {wait:.0f} s")
            self.end()  # what it had started, too
            self._next_start = now + wait
        if now >= self._next_start:
            self.start()

    def end(self, seconds: float = 15.0) -> None:
        """Ends it and all that it started, the hard way if it must."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone, even if it was killed (Linux; elsewhere it lives on)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def last_line(log: Path) -> str:
    """Of a program's log, its white space folded; empty if there is none."""
    return " ".join(log.read_text(errors="replace").strip().splitlines()[-1:]) if log.is_file() else ""


def stay_up(
    children: Sequence[Child],
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    watch: Callable[[], None] = lambda: None,
    poll_seconds: float = 0.5,
) -> None:
    """Keeps all of them running until SIGTERM or Ctrl-C, or until one fails for good; then ends all, last first.

    Args:
        children: what runs.
        report: gets a line of what happens to them.
        watch: is called at every poll.
        poll_seconds: between two polls.

    Raises:
        ValueError: a child failed for good.
        KeyboardInterrupt, SystemExit: the user ended it.
    """
    try:
        while True:
            for child in children:
                child.watch(report)
            watch()
            time.sleep(poll_seconds)
    finally:
        end_all(children)


def path_with_binaries() -> str:
    """``PATH`` with this Python's own programs first."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def end_all(children: Sequence[Child]) -> None:
    """Ends them and what they started, the last first."""
    for child in reversed(children):
        child.end()


def exit_on_sigterm() -> None:
    """SIGTERM becomes SystemExit, so that ``finally`` ends what was started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


@contextmanager
def leaving_threads_behind() -> Iterator[None]:
    """``SystemExit`` ends the process at once, where threads of an engine would keep it: after Ctrl-C those of a
    simulation wait for clients that are gone."""
    try:
        yield
    except SystemExit as end:
        if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
            raise
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
