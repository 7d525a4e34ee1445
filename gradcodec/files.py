"""Files and folders that are written whole or not at all, and outlive a power cut. Loads no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file under a name beside its own, then renames it; an older one stays until then.

    Args:
        path: of the file; its folder exists.
        write: writes the file whole at the path that it is given.

    Raises:
        OSError: no space, or a folder that cannot be written to; nothing of the new file is left.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder of files under a name beside its own, then renames it. An interruption leaves the older folder
    or the new one, whole.

    Args:
        path: of the folder; what is above it is made.
        write: fills the empty folder that it is given.

    Raises:
        OSError: as for ``replace_file``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(part)
        part.chmod(0o755)
        for file in (*part.iterdir(), part):
            sync(file)
        if path.exists():
            old = part.with_name(part.name + "-old")
            os.replace(path, old)
            try:
                os.replace(part, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
