"""What every program leaves behind: a folder that was tried before any work, files written whole or not at all, and
what they were made with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
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


def write_text(text: str, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(content: Any, path: Path) -> None:
    write_text(json.dumps(content, indent=1) + "\n", path)


def provenance() -> dict[str, str]:
    """Versions, commit and date (UTC), for every result file."""
    names = ("flwr", "torch", "transformers", "peft", "constriction", "numpy")
    made_with = {name: version(name) for name in names} | {"python": platform.python_version()}
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "unknown"
    made_with["commit"] = os.environ.get("GIT_COMMIT", found)  # for a copy that has not its own history
    return made_with | {"date": datetime.now(UTC).date().isoformat()}
