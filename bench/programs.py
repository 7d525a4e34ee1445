"""What the benches share: starting the project's programs as a user would, and judging a run beside dense."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_program(module: str, overrides: Sequence[str], flwr_home: Path | None = None) -> None:
    """``python -m MODULE OVERRIDES...``, its output shown, with Flower's home where it is given.

    Raises:
        ValueError: it failed.
    """
    environment = {**os.environ, "FLWR_HOME": str(flwr_home)} if flwr_home is not None else None
    if subprocess.run([sys.executable, "-m", module, *overrides], env=environment).returncode != 0:
        raise ValueError(f"`python -m {module}` failed; the reason stands above")


def kept_fraction(base: float, dense: float, loss: float) -> float:
    """The share of the dense run's improvement over the base model that a run with this final loss reaches; negative
    if it ends above the base model, NaN if dense does not improve."""
    return (base - loss) / (base - dense) if base > dense else float("nan")
