"""Which GPUs each of a host's clients gets."""

from __future__ import annotations

import itertools
import os


def deal_gpus(wanted: str, num_clients: int, per_client: int = 1) -> list[str]:
    """For every client what ``CUDA_VISIBLE_DEVICES`` holds: its GPUs with commas, or nothing.

    Where this process has the variable already (Slurm sets it), only its GPUs are dealt, by the names they have in it.

    Raises:
        ValueError: fewer GPUs than the clients need.
    """
    if wanted == "none":
        return [""] * num_clients
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else _names_in(visible)
    if wanted == "all":
        import torch

        numbers = [str(i) for i in range(torch.cuda.device_count())]
        if not numbers:
            return [""] * num_clients
    else:
        numbers = wanted.split(",")
        if not all(number.isdigit() for number in numbers) or len(set(numbers)) != len(numbers):
            raise ValueError(f"--gpus {wanted}: all, none or different numbers as in 0,1 are expected")
        if names is not None and any(int(number) >= len(names) for number in numbers):
            raise ValueError(
                f"--gpus {wanted}: CUDA_VISIBLE_DEVICES={visible} holds {len(names)} GPUs, which count from 0 here"
            )
    if len(numbers) < num_clients * per_client:
        raise ValueError(
            f"{num_clients} clients need {num_clients * per_client} GPUs, and --gpus {wanted} gives {len(numbers)}: "
            "hold fewer partitions here, or say --gpus none"
        )
    gpus = numbers if names is None else [names[int(number)] for number in numbers]
    return [",".join(gpus[i * per_client : (i + 1) * per_client]) for i in range(num_clients)]


def _names_in(visible: str) -> list[str]:
    """Numbers or UUIDs; for CUDA the list ends at the first that is none, as -1."""
    names = (name.strip() for name in visible.split(","))
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
