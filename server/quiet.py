"""Keeps engines and libraries from talking over what a run says, and from calling home. Import before they start."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TextIO

from conf.console import printable, say

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray would have clients give way to the server, whose evaluation can wait
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}
ENGINE_LOG = "flower.log"
"""In the run's folder: what Flower says, its tracebacks among it."""
_NOISE = ("DEPRECATED", "Federated evaluation will be skipped")
_TRACEBACK = "Traceback (most recent call last)"


def quiet() -> None:
    """Sets the environment for this process and those it starts; keeps warnings and errors of Flower."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    warnings.showwarning = _show_warning  # no filter: Flower puts its own before ours
    logger = logging.getLogger("flwr")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_worth_saying)


def engine_log(folder: Path) -> None:
    """Flower's log: whole into a file of the folder; on the console warnings in one line with the time, without
    colours and tracebacks. Once Flower is imported, since that makes its handler."""
    logger = logging.getLogger("flwr")
    for handler in list(logger.handlers):
        if getattr(handler, "of_a_run", False):  # of the job before
            logger.removeHandler(handler)
            handler.close()
        else:
            handler.setLevel(logging.WARNING)
            handler.format = _in_one_line  # type: ignore[method-assign]  # Flower's own takes no formatter
            handler.addFilter(_no_traceback)
    kept = logging.FileHandler(folder / ENGINE_LOG, delay=True, encoding="utf-8")
    kept.setLevel(logging.INFO)
    kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    kept.of_a_run = True  # type: ignore[attr-defined]
    logger.addHandler(kept)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Those about the future of libraries are their developers' affair."""
    if not issubclass(category, (FutureWarning, DeprecationWarning)):
        say(f"warning: {message}")


def _in_one_line(record: logging.LogRecord) -> str:
    raised = record.exc_info[1] if record.exc_info else None
    text = f"{record.getMessage()}: {raised}" if raised is not None else record.getMessage()
    return f"{logging.Formatter().formatTime(record)[:19]} {record.levelname.lower()}: {printable(text)}"


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _NOISE)


def _no_traceback(record: logging.LogRecord) -> bool:
    return _TRACEBACK not in record.getMessage()
