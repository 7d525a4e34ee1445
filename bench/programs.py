"""What the benches share: starting the project's programs as a user would, and judging a run beside dense."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from conf.output import provenance, write_json


def run_program(
    module: str, overrides: Sequence[str], flwr_home: Path | None = None, prefix: Sequence[str] = ()
) -> None:
    """``python -m MODULE OVERRIDES...``, its output shown, with Flower's home where it is given, and behind a
    ``prefix`` that runs it on another host (``Namespaces.in_server([])``).

    Raises:
        ValueError: it failed.
    """
    environment = {**os.environ, "FLWR_HOME": str(flwr_home)} if flwr_home is not None else None
    if subprocess.run([*prefix, sys.executable, "-m", module, *overrides], env=environment).returncode != 0:
        raise ValueError(f"`python -m {module}` failed; the reason stands above")


def run_once(module: str, overrides: Sequence[str], result: Path, *, anew: bool = False) -> Any:
    """The same, and the JSON that the program writes. Unless ``anew`` it is not run again if it wrote that with these
    settings, at this commit, to which nothing was changed. Raises ValueError: it failed."""
    asked = result.parent / "overrides.json"
    commit = provenance()["commit"]
    asking = {"overrides": [*overrides], "commit": commit}
    known = asked.is_file() and json.loads(asked.read_text()) == asking and not commit.endswith(("-dirty", "unknown"))
    if anew or not (known and result.is_file()):
        run_program(module, overrides)
        write_json(asking, asked)
    return json.loads(result.read_text())


@contextlib.contextmanager
def ends_in_a_line(stopped: str = "stopped", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """A program's errors and Ctrl-C end it with a line: what went wrong, or what ``stopped`` says."""
    known: tuple[type[Exception], ...] = (ValueError, *also)
    try:
        yield
    except known as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(stopped)


TAKEN_UP_AGAIN = "stopped; the same command goes on with the runs that are missing"
"""Of a bench that keeps the runs that it has made."""


def spread_of(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 of one."""
    return stdev(values) if len(values) > 1 else 0.0


def kept_fraction(base: float, dense: float, loss: float) -> float:
    """The share of the dense run's improvement over the base model that a run with this final loss reaches; negative
    if it ends above the base model, NaN if dense does not improve."""
    return (base - loss) / (base - dense) if base > dense else float("nan")
