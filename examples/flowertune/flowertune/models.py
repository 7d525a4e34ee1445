"""The base model with its LoRA adapter, and the loss over batches of records."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

Batch = dict[str, Tensor]


def get_model(config: dict) -> PeftModel:
    """The frozen base model under a new adapter, on the GPU if there is one."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    base = AutoModelForCausalLM.from_pretrained(config["model.name"]).to(device, dtype)
    lora = LoraConfig(
        r=config["lora.r"],
        lora_alpha=config["lora.alpha"],
        target_modules=config["lora.target-modules"].split(",") if config["lora.target-modules"] else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


def learning_rate(server_round: int, config: dict) -> float:
    """From the largest to the smallest along half a cosine over all rounds."""
    share = (server_round - 1) / max(config["num-server-rounds"] - 1, 1)
    least, most = config["train.learning-rate-min"], config["train.learning-rate-max"]
    return least + (most - least) * 0.5 * (1 + math.cos(math.pi * share))


def train(model: PeftModel, batches: Iterable[Batch], lr: float) -> float:
    """One step a batch; the mean loss."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=lr, weight_decay=0.0)
    model.train()
    losses = []
    for batch in batches:
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def evaluate(model: PeftModel, batches: Iterable[Batch]) -> float:
    """Nats a token of the responses."""
    model.eval()
    total = tokens = 0.0
    for batch in batches:
        count = float((batch["labels"][:, 1:] != -100).sum())
        total += _loss(model, batch).item() * count
        tokens += count
    return total / tokens


def _loss(model: PeftModel, batch: Batch) -> Tensor:
    return model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
