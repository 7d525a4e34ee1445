"""Where runs lie: the one that was started last, and the command that goes on with one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from adapters.files import CONFIG, check_adapter_files
from conf.arguments import hydra_value, shell_word
from conf.console import printable
from conf.output import write_text
from server.records.events import NAME

LATEST = "latest"
ROOTS = (Path("outputs"), Path("multirun"))
_POINTER = Path("outputs/federate") / LATEST
CHECKPOINT = "checkpoint.safetensors"


def remember(output: Path) -> None:
    """That this run was started last from the current folder, wherever it lies."""
    with contextlib.suppress(OSError, ValueError):  # a convenience, that ends no run
        _POINTER.parent.mkdir(parents=True, exist_ok=True)
        write_text(f"{output.absolute()}\n", _POINTER)


def latest() -> Path:
    """The run that was started last from the current folder. Raises ValueError: there is none."""
    with contextlib.suppress(OSError, ValueError):
        folder = Path(_POINTER.read_text(encoding="utf-8").strip())
        if (folder / NAME).is_file():
            return folder
    logs = [path for root in ROOTS if root.is_dir() for path in root.rglob(NAME)]
    if not logs:
        raise ValueError(f"no run was started from {Path.cwd()}: give the run's output folder")
    return max(logs, key=lambda path: path.stat().st_mtime).parent


def found(folder: str) -> Path:
    """``latest``, or the folder that is named."""
    return latest() if folder == LATEST and not Path(folder).exists() else Path(folder).expanduser()


def adapter_folder(path: str) -> Path:
    """The PEFT directory that is named, or that of the run whose output folder is. Raises ValueError: no adapter."""
    inner = Path(path) / "adapter"
    folder = inner if (inner / CONFIG).is_file() else Path(path)
    check_adapter_files(folder)
    return folder


def continuation(output: Path) -> str:
    """What goes on with a run that did not end."""
    if not (output / CHECKPOINT).is_file():
        return f"it had finished no round that is kept in {printable(output)}: start it again"
    override = f"resume={hydra_value(str(output))}"
    return f"`python -m server.federate {shell_word(override)}` goes on with it"
