"""What every program leaves behind: a folder that was tried before any work, files written whole or not at all, and
what they were made with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conf import CHECKOUT
from gradcodec import files

TRIAL_BYTES = 64 * 1024


class OutputError(ValueError):
    """A file or folder cannot be written: no space, no permission, no such place. The message names it."""


def open_output(folder: Path) -> Path:
    """The folder, made and tried with a few bytes. Raises OutputError: it cannot be written to."""
    trial = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with trial.open("wb") as file:
                file.write(bytes(TRIAL_BYTES))
                os.fsync(file.fileno())
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"output={str(folder)!r} cannot be written to: {error.strerror}") from None
    return folder


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file whole or not at all, so that not even a loss of power leaves half of it or an empty one.

    As ``gradcodec.files.replace_file``, with an error that names the file. What a killed process left of the temporary
    file is written over.

    Raises:
        OutputError: the disk is full, or the place cannot be written to; ``path`` is as it was.
    """
    try:
        files.replace_file(path, write)
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise OutputError(f"{path} cannot be written: {reason}") from error


def _reason(error: Exception) -> str | None:
    """Why a file cannot be written, if that is what the error says; libraries of their own kinds say it in words."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    words = ("No space left", "Disk quota", "Permission denied", "Read-only file system", "File too large")
    return " ".join(text.split()) if any(word in text for word in words) else None


def write_text(text: str, path: Path) -> None:
    """UTF-8, whole or not at all. Raises OutputError as ``replace_file`` does."""
    replace_file(path, lambda part: _write(part, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(content: Any, path: Path) -> None:
    """As ``write_text``."""
    write_text(json.dumps(content, indent=1) + "\n", path)


def provenance() -> dict[str, str]:
    """Versions, commit and date (UTC), for every result file."""
    names = ("flwr", "torch", "transformers", "peft", "constriction", "numpy")
    made_with = {name: version(name) for name in names} | {"python": platform.python_version()}
    made_with["commit"] = os.environ.get("GIT_COMMIT", _commit())  # for a copy that has not its own history
    return made_with | {"date": datetime.now(UTC).date().isoformat()}


def _commit() -> str:
    """Of this checkout; where it is installed, the release: what lies around it may be another project's history."""
    if not (CHECKOUT / ".git").exists():
        try:
            return f"release {version('cg-fedllm')}"
        except PackageNotFoundError:
            return "unknown"
    git = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
