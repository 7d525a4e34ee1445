"""What every program leaves behind: a folder that was tried before any work, files written whole or not at all, and
what they were made with."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def open_output(folder: Path) -> Path:
    """The folder, made and tried. Raises ValueError: it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / ".writable"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"output={str(folder)!r} cannot be written to: {error.strerror}") from None
    return folder


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file whole or not at all: what was there before stays until the new one is on the disk.

    Args:
        write: writes the file that it is given, a new one beside ``path``.

    Raises:
        OSError: it cannot be written; ``write`` raises what it will. Nothing is left behind.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Has the disk hold a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(text: str, path: Path) -> None:
    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    replace_file(path, write)


def write_json(content: Any, path: Path) -> None:
    write_text(json.dumps(content, indent=1) + "\n", path)


def provenance() -> dict[str, str]:
    """Versions, commit and date (UTC), for every result file."""
    names = ("flwr", "torch", "transformers", "peft", "constriction", "numpy")
    made_with = {name: version(name) for name in names} | {"python": platform.python_version()}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        made_with["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        made_with["commit"] = "unknown"
    return made_with | {"date": datetime.now(UTC).date().isoformat()}
