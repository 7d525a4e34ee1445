"""Which files of a folder are data. Knows names; must not know what the files hold."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

HELDOUT = frozenset({"test", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout"})
"""Words of a file's or folder's name that say: not to be trained on."""
TRAIN = frozenset({"train", "training"})
NO_DATA = frozenset(
    {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "metadata.json", "croissant.json"}
)
"""What tools of the hub write beside the data."""


def data_files(folder: Path, is_data: Callable[[Path], bool]) -> tuple[list[Path], list[str]]:
    """The files to train on, in a fixed order, and one line on each group of files that are left out.

    Hidden files and folders (``.ipynb_checkpoints``, ``._train.jsonl``) are none. Files that are named as held out
    (``HELDOUT``) are left out beside others; alone they are read, and a line says so.

    Args:
        is_data: whether a file of this name can be read.
    """
    seen = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    files = [path for path in seen if is_data(path) and path.name.lower() not in NO_DATA]
    held = [path for path in files if _is_held_out(path.relative_to(folder))]
    if not held:
        return files, []
    names = _names(held, folder)
    if len(held) == len(files):
        return files, [f"{folder} holds nothing but files named as held out ({names}): they are trained on"]
    return [path for path in files if path not in held], [f"{names} in {folder}: named as held out, so not trained on"]


def same_names(files: Sequence[Path]) -> list[list[Path]]:
    """Files of one name but for their suffixes, as ``a.jsonl`` and ``a.jsonl.gz``: copies of the same data."""
    by_name: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        by_name[file.parent / re.sub(r"(\.[A-Za-z]+)(\.gz)?$", "", file.name, flags=re.IGNORECASE)].append(file)
    return [found for found in by_name.values() if len(found) > 1]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _is_held_out(path: Path) -> bool:
    words = set(re.findall("[a-z]+", str(path.with_suffix("")).lower().replace("held-out", "heldout")))
    return bool(words & HELDOUT) and not words & TRAIN


def _names(files: Sequence[Path], folder: Path) -> str:
    first = ", ".join(str(file.relative_to(folder)) for file in files[:3])
    return first if len(files) <= 3 else f"{first} and {len(files) - 3} more"
