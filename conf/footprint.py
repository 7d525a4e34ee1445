"""What a run's clients and its server need of their devices' memory: ``adapters.footprint``, and the codec."""

from __future__ import annotations

import dataclasses

from adapters.base import resolve_device
from adapters.footprint import MemoryEstimate, adapter_size, estimate_evaluation, estimate_memory
from adapters.spaces import NUM_DIRECTIONS
from conf.schema import Settings
from gradcodec.learned.basis import MOST_DIRECTIONS
from gradcodec.registry import entry_of


def client_memory(settings: Settings) -> MemoryEstimate:
    """From config.json alone. Raises ValueError: the model cannot be served."""
    estimate = estimate_memory(settings.model, settings.lora, settings.train, settings.task.window)
    return _with_codec(estimate, settings)


def server_memory(settings: Settings) -> MemoryEstimate:
    """Of the process that evaluates, and in the arm ``centralised`` trains. Raises ValueError: as ``client_memory``."""
    estimate = estimate_memory if settings.arm == "centralised" else estimate_evaluation
    needed = estimate(settings.model, settings.lora, settings.train, settings.task.window)
    return _with_codec(needed, settings)  # which encodes a trial, to check budgets, and broadcasts


def _with_codec(estimate: MemoryEstimate, settings: Settings) -> MemoryEstimate:
    if settings.arm != "coded":
        return estimate
    entry = entry_of(settings.codec.name)
    num_values, num_columns = adapter_size(settings.model, settings.lora)
    needed = 4 * entry.encoding_updates * num_values
    if entry.derives_directions and settings.codec.basis != "artifact":
        on_host = resolve_device(settings.model).type == "cpu"  # there they are derived, in float64
        of_a_column = 4 * NUM_DIRECTIONS + 14 * MOST_DIRECTIONS if on_host else 4 * MOST_DIRECTIONS
        needed += of_a_column * num_columns
    return dataclasses.replace(estimate, codec=needed)
