"""Which partition a node's key was made for, as the deployment's folder says."""

from __future__ import annotations

import json
import os
from pathlib import Path

FOLDER_VARIABLE = "CG_FEDLLM_DEPLOY"  # environment: the folder of a deployment's keys
NAME = "partitions.json"


def read_bindings() -> dict[int, int]:
    """Node id -> partition; empty where no deployment says so.

    Raises:
        ValueError: the file is there and cannot be read.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    path = Path(folder) / NAME if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        bound = {int(node): partition for node, partition in content.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}): `python -m server keys` writes it") from None
    if not all(type(partition) is int and partition >= 0 for partition in bound.values()):
        raise ValueError(f"{path} holds a partition that is no number from 0 on: `python -m server keys` writes it")
    return bound
