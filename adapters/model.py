"""The base model, the LoRA adapter in it, and the adapter's tensors in and out.

An adapter is a dict, PEFT tensor name -> float32 tensor: on the model's device where it comes from the model, else on
the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.architectures import Parts, fused_parts, modules_to_save, target_modules
from adapters.base import empty_base, is_quantized, load_base, resolve_device
from adapters.settings import LoraSettings, ModelSettings, check_kind

Adapter = dict[str, Tensor]
_QUANTISED = {"int8": torch.uint8, "nf4": torch.bfloat16}
"""``model.quantization`` -> the type that PEFT rounds an adapter to when it is made over such layers; none over
integers. Over nf4 it is the one that is computed in (``base.load_base``)."""


def load_model(settings: ModelSettings, lora: LoraSettings, seed: int) -> PeftModel:
    """The frozen base model with a fresh adapter in it, the same adapter for the same seed everywhere.

    Adapter weights are float32 whatever the base's type. A quantised base keeps its other weights in float32.

    Raises:
        ValueError: the model cannot be loaded (``base.load_base``), ``lora`` names no module of it, or the two do not
            go together.
    """
    check_kind(settings, lora)
    base = load_base(settings)
    if is_quantized(base):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = _with_adapter(base, lora, seed)
    return model if is_quantized(base) else model.to(resolve_device(settings))


def empty_model(settings: ModelSettings, lora: LoraSettings) -> PeftModel:
    """What ``load_model`` gives, on the meta device and unquantised: shapes without weights, from config.json alone.

    Raises:
        ValueError: as ``load_model``.
    """
    return _with_adapter(empty_base(settings), lora, seed=0)


def outline_model(settings: ModelSettings, lora: LoraSettings, seed: int) -> PeftModel:
    """What ``load_model`` gives, from config.json alone: the adapter that the seed gives, bit for bit, on the CPU, in a
    base model without weights. Every tensor of the base is one zero, expanded, which takes no memory: what PEFT makes
    of the seed depends on the base's shapes and types alone.

    Raises:
        ValueError: as ``load_model``; or the model is stored quantised, and its types are not known from config.json.
    """
    base = empty_base(settings)
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            f"model.path={settings.path!r} is stored quantised: the adapter that the seed gives there is not known "
            "from config.json alone (server.base=none); give a model that is not, and model.quantization=nf4 or int8"
        )
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = _QUANTISED.get(settings.quantization) if isinstance(module, nn.Linear) else None
                zeros = torch.zeros((), dtype=dtype or parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return _with_adapter(base, lora, seed)


def _with_adapter(base: PreTrainedModel, lora: LoraSettings, seed: int) -> PeftModel:
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=modules_to_save(base, lora.modules_to_save) or None,
        target_modules=target_modules(base, lora.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.requires_grad = lora.train == "both" or ".lora_A." not in name
    for wrapper in _saved(model):
        _compute_in_float32(wrapper)
    _check_patterns(model, lora)
    if lora.local:
        layers = _layers(model)
        local = [layer for layer in layers if any(_is_of(pattern, layer) for pattern in lora.local)]
        if len(local) == len(layers):
            raise ValueError("lora.local holds all adapted layers: no factors are left to train together")
        config.exclude_modules = local  # the adapter that is shared, and so written, has none of these
    return model


def _saved(model: nn.Module) -> list[ModulesToSaveWrapper]:
    return [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]


def _own(wrapper: ModulesToSaveWrapper) -> nn.Module:
    """The copy that is trained."""
    own: nn.Module = wrapper.modules_to_save["default"]
    return own


def _base_type(wrapper: ModulesToSaveWrapper) -> torch.dtype:
    first: nn.Parameter = next(wrapper.original_module.parameters())
    return first.dtype


def _compute_in_float32(wrapper: ModulesToSaveWrapper) -> None:
    """Its weights are float32 as those of the factors are: what goes in and out keeps the base model's type."""
    if (dtype := _base_type(wrapper)) != torch.float32:
        own = _own(wrapper)
        weight: nn.Parameter = next(own.parameters())  # of the base model's type, too, once it is merged
        own.register_forward_pre_hook(lambda _, inputs: tuple(one.to(weight.dtype) for one in inputs))
        own.register_forward_hook(lambda _, inputs, output: output.to(dtype))


def merged(model: PeftModel) -> PreTrainedModel:
    """The base model with the adapter merged in, in the types of the base's weights; the model is used up."""
    for wrapper in _saved(model):
        _own(wrapper).to(_base_type(wrapper))
    base: PreTrainedModel = model.merge_and_unload()
    return base


def _check_patterns(model: PeftModel, lora: LoraSettings) -> None:
    """Raises ValueError: a pattern is of no adapted layer, and so would change nothing."""
    layers = _layers(model)
    for key in ("rank_pattern", "alpha_pattern", "local"):
        for pattern in getattr(lora, key):
            if not any(_is_of(pattern, layer) for layer in layers):
                raise ValueError(
                    f"lora.{key}: {pattern!r} is the end of no adapted layer's name, such as {layers[0]!r}: PEFT "
                    "matches a regular expression with all of it, or with what is behind a dot"
                )


def _layers(model: PeftModel) -> list[str]:
    """The full names of the adapted ones."""
    return [layer_of(name) for name in _whole_state(model) if ".lora_A." in name]


def layer_of(name: str) -> str:
    """The full name of the layer that a tensor of an adapter belongs to."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _is_of(pattern: str, layer: str) -> bool:
    return bool(get_pattern_key([pattern], layer) == pattern)


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """PEFT tensor name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in _state(model).items()}


def whole_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """The same with the layers that are not shared (``lora.local``)."""
    return {name: tuple(tensor.shape) for name, tensor in _whole_state(model).items()}


def adapter_parts(model: PeftModel) -> dict[str, Parts]:
    """PEFT tensor name -> part name -> rows, of the adapter's tensors that serve several projections at once."""
    return fused_parts(model.get_base_model().config, adapter_shapes(model))


def get_adapter(model: PeftModel) -> Adapter:
    """A copy of the adapter's tensors, float32, on the model's device."""
    return {name: tensor.detach().float().clone() for name, tensor in _state(model).items()}


def set_adapter(model: PeftModel, adapter: Mapping[str, Tensor]) -> None:
    """Puts an adapter's tensors into the model.

    Raises:
        ValueError: its names or shapes are not those of the model's adapter.
    """
    own = _state(model)
    if own.keys() != adapter.keys():
        name = sorted(own.keys() ^ adapter.keys())[0]
        raise ValueError(f"the adapter and the model differ in tensor {name!r}: another base model or target modules?")
    for name, tensor in own.items():
        if tensor.shape != adapter[name].shape:
            shapes = f"{tuple(adapter[name].shape)}, the model wants {tuple(tensor.shape)}"
            raise ValueError(f"adapter tensor {name!r} has shape {shapes}: another lora.rank or base model?")
    set_peft_model_state_dict(model, dict(adapter))


def get_local(model: PeftModel) -> Adapter:
    """A copy of the tensors of layers that are not shared, float32, on the CPU; empty without ``lora.local``."""
    local = _local_layers(model)
    return {
        name: t.detach().float().cpu().clone() for name, t in _whole_state(model).items() if layer_of(name) in local
    }


def set_local(model: PeftModel, local: Mapping[str, Tensor]) -> None:
    """Inverse of ``get_local``; the shared tensors stay as they are."""
    if local:
        set_peft_model_state_dict(model, {**_state(model), **local})  # PEFT wants modules that are saved to be there


def freeze_local(model: PeftModel) -> None:
    """Layers that are not shared are not trained here: a server has nobody's."""
    local = _local_layers(model)
    for name, parameter in model.named_parameters():
        if layer_of(name) in local:
            parameter.requires_grad = False


def subtract(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Adapter:
    """The update that leads from ``old`` to ``new``, on the device of ``new``."""
    return {name: new[name] - old[name].to(new[name].device) for name in new}


def add(adapter: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Adapter:
    """The adapter after an update; undoes ``subtract`` up to float32 rounding."""
    return {name: adapter[name] + update[name] for name in adapter}


def on_host(adapter: Mapping[str, Tensor]) -> Adapter:
    """The same in the host's memory, where the network and the disk take it from."""
    return {name: tensor.cpu() for name, tensor in adapter.items()}


def _state(model: PeftModel) -> dict[str, Tensor]:
    local = _local_layers(model)
    return {name: tensor for name, tensor in _whole_state(model).items() if layer_of(name) not in local}


def _local_layers(model: PeftModel) -> frozenset[str]:
    """The full names of those that are not shared (``lora.local``), as ``_with_adapter`` noted them."""
    return frozenset(model.peft_config["default"].exclude_modules or ())


def _whole_state(model: PeftModel) -> dict[str, Tensor]:
    # without the setting PEFT asks the hub whether the vocabulary has grown
    state: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
