"""What training and evaluating need of a device's memory, from config.json alone, and whether the device has it.

The sum is that of Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models", section 4),
counted anew for what autograd keeps where the base weights are frozen: a frozen linear layer keeps no input, LoRA keeps
its own, a nonlinearity keeps what it is computed from. Weights are exact; the rest is near for LLaMA and its like, too
low where an architecture does more between its layers (soft caps, GPT-2's GELU), and leaves out activations inside the
experts of a mixture. Knows shapes; must not know weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import ceil, prod
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.architectures import attention_layers, linear_layers
from adapters.base import empty_base
from adapters.model import empty_model, whole_shapes
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, for_evaluation

_FLOAT = 4
_MAGNITUDE = ".lora_magnitude_vector"
_NF4_BLOCK, _NF4_OUTER_BLOCK = 64, 256
_NF4_TABLES = _FLOAT * (16 + 256 + 1)
"""Both code books and the offset of a tensor."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a step occupies at its peak, without what the libraries themselves take."""

    weights: int  # of the frozen base
    adapter: int  # its values; in training its gradients and the optimizer's moments, too
    activations: int  # what the forward pass keeps for the backward pass, or holds of one layer
    logits: int  # and what the loss makes of them
    workspace: int  # of one layer: its quantised weights, unpacked; what DoRA's norms are taken of
    codec: int = 0  # to encode the update after training, or to decode one: not known here

    @property
    def total(self) -> int:
        return sum(self._parts().values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_text(size)}" for name, size in self._parts().items())
        return f"{_text(self.total)} ({parts})"

    def _parts(self) -> dict[str, int]:
        sizes = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: size for name, size in sizes.items() if size}


def estimate_evaluation(
    settings: ModelSettings, lora: LoraSettings, training: TrainSettings, window: int
) -> MemoryEstimate:
    """What ``heldout_loss`` needs of the device's memory: a forward pass that keeps nothing of its layers, which are
    done when the logits are made. As ``estimate_memory``."""
    step = estimate_memory(for_evaluation(settings), lora, training, window)
    config = empty_base(settings).config.get_text_config()
    of_a_layer = ceil(step.activations / config.num_hidden_layers)
    stream = training.micro_batch_size * window * config.hidden_size * _width(settings)
    activations = 3 * stream + max(0, of_a_layer - step.logits)  # the residual stream, its norm, a layer's output
    return dataclasses.replace(step, adapter=_FLOAT * num_adapter_values(settings, lora), activations=activations)


def estimate_memory(
    settings: ModelSettings, lora: LoraSettings, training: TrainSettings, window: int
) -> MemoryEstimate:
    """What ``finetune`` needs of the device's memory; nothing but config.json is read.

    Args:
        settings: the base model and how it is held.
        lora: the adapter in it.
        training: of the micro-batch and the optimizer.
        window: tokens a window; a pass takes ``training.micro_batch_size`` windows.

    Raises:
        ValueError: as ``load_model``.
    """
    base, model = empty_base(settings), empty_model(settings, lora)
    config = base.config.get_text_config()
    num_tokens = training.micro_batch_size * window
    width = _width(settings)
    num_values = sum(prod(shape) for shape in whole_shapes(model).values())
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_moments = 2 if training.update == "delta" else 0
    a_token = _kept_by_layers(base, settings) + _kept_by_adapter(model, settings) + _kept_by_dora(model, settings)
    a_token += _kept_by_saved(model)
    if base.config._attn_implementation == "eager":
        a_token += config.num_hidden_layers * config.num_attention_heads * window * (width + _FLOAT)
    if settings.gradient_checkpointing:
        num_layers = config.num_hidden_layers
        a_token = num_layers * config.hidden_size * width + ceil(a_token / num_layers)
    quantized = [] if settings.quantization == "none" else _linear(base)
    return MemoryEstimate(
        weights=_weights(base, settings),
        adapter=_FLOAT * (num_values + num_trained * (1 + num_moments)),
        activations=num_tokens * a_token,
        logits=num_tokens * config.vocab_size * (width + 2 * _FLOAT),
        workspace=max((width * prod(_sizes(layer)) for layer in quantized), default=0) + _normed_at_once(model),
    )


def num_adapter_values(settings: ModelSettings, lora: LoraSettings) -> int:
    """Of all tensors of an adapter for the model, trained or not."""
    return adapter_size(settings, lora)[0]


def adapter_size(settings: ModelSettings, lora: LoraSettings) -> tuple[int, int]:
    """Of an adapter for the model: the values of all its tensors, and the widths of its factors, which are inputs of A
    and outputs of B whatever the ranks."""
    shapes = whole_shapes(empty_model(settings, lora)).values()
    return sum(map(prod, shapes)), sum(max(shape) for shape in shapes if len(shape) == 2)


def check_fits(estimate: MemoryEstimate, device: torch.device, *, training: bool = True) -> None:
    """Raises ValueError, with the estimate and what would help, if the device has less memory free than that. Where
    the free memory is not known, nothing is refused."""
    free = free_bytes(device)
    if free is not None and estimate.total > free:
        work, first = ("training", "model.gradient_checkpointing=true, ") if training else ("evaluating", "")
        raise ValueError(
            f"{work} needs about {estimate}, {device} has {_text(free)} free: try {first}"
            "a smaller train.micro_batch_size, a shorter task.window or model.quantization=nf4"
        )


def free_bytes(device: torch.device) -> int | None:
    """Of a GPU's memory, or of this machine's; None: not known here."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(available[0]) if available else None


def _weights(base: PreTrainedModel, settings: ModelSettings) -> int:
    layers = [] if settings.quantization == "none" else _linear(base)
    num_packed = sum(prod(_sizes(layer)) for layer in layers)
    num_plain: int = sum(parameter.numel() for parameter in base.parameters()) - num_packed
    return num_plain * _width(settings) + sum(_packed(*_sizes(layer), settings.quantization) for layer in layers)


def _packed(num_inputs: int, num_outputs: int, quantization: str) -> int:
    num_weights = num_inputs * num_outputs
    if quantization == "int8":
        return num_weights + _FLOAT * num_outputs
    num_blocks = ceil(num_weights / _NF4_BLOCK)
    return ceil(num_weights / 2) + num_blocks + _FLOAT * ceil(num_blocks / _NF4_OUTER_BLOCK) + _NF4_TABLES


def _kept_by_layers(base: PreTrainedModel, settings: ModelSettings) -> int:
    """Bytes a token: inputs of the norms, in float32; q, k, v and the output of attention; what a plain (one up) or
    gated (two up) feed-forward network keeps of its inner values, once or three times as many as it has."""
    norms = [module for module in base.modules() if "Norm" in type(module).__name__]
    weights = [getattr(norm, "weight", None) for norm in norms]
    hidden = base.config.get_text_config().hidden_size  # what a norm without weights takes, at most
    normed = sum(hidden if weight is None else weight.numel() for weight in weights)
    attention = set(attention_layers(base))
    sizes = {name: _sizes(base.get_submodule(name)) for name in linear_layers(base)}
    projected = sum(outputs for name, (_, outputs) in sizes.items() if name in attention)
    feed_forward = [size for name, size in sizes.items() if name not in attention]
    up = sum(outputs for inputs, outputs in feed_forward if outputs > inputs)
    down = sum(inputs for inputs, outputs in feed_forward if inputs > outputs)
    kept: int = _FLOAT * normed + _width(settings) * (projected + 2 * up - down)
    if settings.quantization == "int8":  # bitsandbytes keeps the inputs of its layers, too
        kept += _FLOAT * _distinct_inputs(
            {name: inputs for name, (inputs, _) in sizes.items() if name not in attention}
        )
    return kept


def _kept_by_adapter(model: PeftModel, settings: ModelSettings) -> int:
    """Bytes a token: the inputs of A and of B. In float32 layers side by side share theirs; else each has its copy."""
    inputs = {name: shape[1] for name, shape in whole_shapes(model).items() if ".lora_A." in name}
    ranks = sum(shape[0] for name, shape in whole_shapes(model).items() if ".lora_A." in name)
    layers = {name.partition(".lora_A.")[0]: size for name, size in inputs.items()}
    return _FLOAT * (ranks + (_distinct_inputs(layers) if _width(settings) == _FLOAT else sum(layers.values())))


def _kept_by_dora(model: PeftModel, settings: ModelSettings) -> int:
    """Bytes a token: what a layer and its factors give, both of which a magnitude scales."""
    outputs = sum(shape[0] for name, shape in whole_shapes(model).items() if name.endswith(_MAGNITUDE))
    return (_FLOAT + _width(settings)) * outputs


def _kept_by_saved(model: PeftModel) -> int:
    """Bytes a token: what a norm that is trained scales, in float32."""
    weights = [
        shape for name, shape in whole_shapes(model).items() if ".lora_" not in name and name.endswith(".weight")
    ]
    return _FLOAT * sum(map(prod, weights))


def _normed_at_once(model: PeftModel) -> int:
    """Bytes of the layer that needs most: PEFT sends the identity through both factors, and sums up product and
    weights to take the norms."""
    shapes = whole_shapes(model)
    layers = [name.removesuffix(_MAGNITUDE) for name in shapes if name.endswith(_MAGNITUDE)]
    sizes = [(shapes[f"{layer}.lora_A.weight"][1], shapes[f"{layer}.lora_B.weight"][0]) for layer in layers]
    return max((_FLOAT * inputs * (inputs + 3 * outputs) for inputs, outputs in sizes), default=0)


def _distinct_inputs(inputs: Mapping[str, int]) -> int:
    """Layer name -> its input's size; layers of one module with inputs of one size have the same input."""
    return sum(size for _, size in {(name.rpartition(".")[0], size) for name, size in inputs.items()})


def _linear(base: PreTrainedModel) -> list[nn.Module]:
    """The layers that bitsandbytes quantises."""
    layers: list[nn.Module] = [base.get_submodule(name) for name in linear_layers(base)]
    return [layer for layer in layers if type(layer) in (nn.Linear, Conv1D)]


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def _width(settings: ModelSettings) -> int:
    """Bytes of a value between the layers; around quantised weights all is float32."""
    return _FLOAT if settings.quantization != "none" else int(getattr(torch, settings.dtype).itemsize)


def _text(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
