"""The base model, the LoRA adapter in it, and the adapter's tensors in and out.

An adapter is a dict: PEFT tensor name -> float32 tensor on the CPU. The base model's weights never leave this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

Adapter = dict[str, Tensor]


@dataclass
class ModelSettings:
    """Which base model, and how it is held."""

    path: str = "assets/tiny-llama"
    dtype: str = "float32"  # of the frozen base weights: float32, bfloat16 or float16
    device: str = "auto"  # auto: the first GPU, else the CPU


@dataclass
class LoraSettings:
    """The LoRA adapter (Hu et al. 2022)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    train: str = "both"  # both factors | b: A stays as it was drawn (FFA-LoRA, Sun et al. 2024)


def check_lora(settings: LoraSettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if settings.train not in ("both", "b"):
        raise ValueError(f"lora.train={settings.train!r} is none of both, b")
    if settings.rank < 1:
        raise ValueError(f"lora.rank={settings.rank} must be at least 1")


def check_model(settings: ModelSettings) -> None:
    """Raises ValueError if the settings cannot be served; loads nothing."""
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"model.dtype={settings.dtype!r} is none of float32, bfloat16, float16")
    path = Path(settings.path)
    if not (path / "config.json").is_file():
        what = "holds no config.json" if path.is_dir() else "is no directory"
        raise ValueError(f"model.path={settings.path!r} {what}: give a Hugging Face model directory")


def resolve_device(settings: ModelSettings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    check_model(settings)
    return AutoTokenizer.from_pretrained(settings.path, local_files_only=True)


def load_model(settings: ModelSettings, lora: LoraSettings, seed: int) -> PeftModel:
    """The frozen base model with a fresh adapter in it, the same adapter for the same seed everywhere.

    Adapter weights are float32 whatever the base's type.

    Raises:
        ValueError: no model there, or ``lora.target_modules`` names no module of it.
    """
    check_model(settings)
    base = AutoModelForCausalLM.from_pretrained(
        settings.path, dtype=getattr(torch, settings.dtype), local_files_only=True
    )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.requires_grad = lora.train == "both" or ".lora_B." in name
    return model.to(resolve_device(settings))


def get_adapter(model: PeftModel) -> Adapter:
    """A copy of the adapter's tensors."""
    state = get_peft_model_state_dict(model)
    return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}


def set_adapter(model: PeftModel, adapter: Mapping[str, Tensor]) -> None:
    """Puts an adapter's tensors into the model.

    Raises:
        ValueError: its names or shapes are not those of the model's adapter.
    """
    own = get_peft_model_state_dict(model)
    if own.keys() != adapter.keys():
        name = sorted(own.keys() ^ adapter.keys())[0]
        raise ValueError(f"the adapter and the model differ in tensor {name!r}: another base model or target modules?")
    for name, tensor in own.items():
        if tensor.shape != adapter[name].shape:
            shapes = f"{tuple(adapter[name].shape)}, the model wants {tuple(tensor.shape)}"
            raise ValueError(f"adapter tensor {name!r} has shape {shapes}: another lora.rank or base model?")
    set_peft_model_state_dict(model, dict(adapter))


def subtract(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Adapter:
    """The update that leads from ``old`` to ``new``."""
    return {name: new[name] - old[name] for name in new}


def add(adapter: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Adapter:
    """The adapter after an update; undoes ``subtract`` up to float32 rounding."""
    return {name: adapter[name] + update[name] for name in adapter}
