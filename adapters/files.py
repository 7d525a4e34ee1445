"""The files of a PEFT adapter directory, by name alone. Loads no torch."""

from __future__ import annotations

from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter_files(folder: Path) -> None:
    """Raises ValueError: a file of an adapter is missing in the folder."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            what = f"holds no {name}" if folder.is_dir() else "is no directory"
            raise ValueError(f"{folder} {what}: give a PEFT adapter directory, or the output folder of a finished run")
