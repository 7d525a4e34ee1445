"""Parameters and operations of a language model's local training, from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from adapters.model import empty_model
from adapters.settings import LoraSettings, ModelSettings, TrainSettings


@dataclass(frozen=True)
class ModelWork:
    """One local step of one client.

    Attributes:
        num_parameters: of the base model.
        num_adapter: values of the adapter.
        tokens: of the step: windows times their length.
        forward_operations: floating-point operations of the matrix products of its forward pass, two for each
            multiplication and addition.
    """

    num_parameters: int
    num_adapter: int
    tokens: int
    forward_operations: int


def step_work(model: ModelSettings, lora: LoraSettings, train: TrainSettings, window: int) -> ModelWork:
    """Counted on the meta device, without weights. Raises ValueError: the model cannot be read."""
    peft = empty_model(model, lora)
    adapter = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name)
    tokens = torch.zeros(train.batch_size, window, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        peft.to("meta")(input_ids=tokens)
    return ModelWork(
        sum(p.numel() for p in peft.parameters()) - adapter, adapter, tokens.numel(), counter.get_total_flops()
    )
