"""What architectures call their layers: the linear layers that an adapter goes into, and those that are several in one.

Targets are found from the model's own modules, by what transformers calls their classes, not from a list of models.
Knows modules, names and shapes; must not know weights, settings or codecs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.settings import ALL_LINEAR, ATTENTION, NORMS

Parts = dict[str, tuple[range, ...]]
"""Name of a part -> the rows of the whole that are its own."""
_INTERLEAVED = {
    "bloom": "query_key_value",
    "falcon": "query_key_value",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "gpt_neox_japanese": "query_key_value",
    "persimmon": "query_key_value",
}
"""Model type -> its projection with q, k and v of one key-value head after the other."""
_STACKED = {
    "dbrx": "Wqkv",
    "gpt2": "c_attn",
    "mpt": "Wqkv",
    "phi3": "qkv_proj",
}
"""Model type -> its projection with all of q, then all of k, then all of v."""
_GATE_UP = "gate_up_proj"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of all linear layers that text passes, without the output head, in the model's order.

    Of a model of several modalities these are the layers of its language model: text alone is trained on, so that an
    adapter in a vision tower would get no gradient.
    """
    head, text = model.get_output_embeddings(), _text_part(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and name.startswith(text)
    ]


def fused_experts(model: PreTrainedModel) -> dict[str, int]:
    """Name -> number of values of the parameters that hold the matrices of several experts in one tensor.

    They are no layers: ``all-linear`` leaves them out. (PEFT's ``target_parameters`` could take them, in tensors that
    neither vLLM nor a codec of LoRA pairs reads: they stay frozen.)
    """
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in f".{name}." and ".lora_" not in name
    }


def left_out(model: PreTrainedModel, wanted: Sequence[str]) -> str | None:
    """What a user would expect of ``lora.target_modules`` and does not get, in one line; None: nothing."""
    experts = fused_experts(model)
    if ALL_LINEAR not in wanted or not experts:
        return None
    share = sum(experts.values()) / sum(parameter.numel() for parameter in model.parameters())
    names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in experts))
    return (
        f"lora.target_modules=[{ALL_LINEAR}] leaves out the experts ({names}: {len(experts)} tensors, {share:.0%} of "
        "the model's parameters): each holds all experts of a layer in one tensor and stays as it is"
    )


def _text_part(model: PreTrainedModel) -> str:
    """How the names of the language model's modules begin; empty where the model is nothing else."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def attention_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that lie inside an attention module, in the model's order."""
    blocks = [f"{name}." for name, module in model.named_modules() if "Attention" in type(module).__name__]
    return [name for name in linear_layers(model) if name.startswith(tuple(blocks))]


def target_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """The ends of module names by which PEFT finds the layers for an adapter.

    Args:
        model: the base model, without an adapter; its modules are enough.
        wanted: names of modules or ends of them; ``attention`` stands for q, k, v and o whatever the architecture calls
            them, ``all-linear`` for every linear layer but the output head.

    Raises:
        ValueError: one of them is no linear layer of this model.
    """
    layers = linear_layers(model)
    everywhere = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    others = sorted({*everywhere} - {*layers})
    groups = {ATTENTION: attention_layers(model), ALL_LINEAR: layers}
    targets: list[str] = []
    for name in wanted:
        found = groups[name] if name in groups else [layer for layer in layers if f".{layer}".endswith(f".{name}")]
        if not found:
            leaves = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise ValueError(f"lora.target_modules: {name!r} is no linear layer of this model, which has {leaves}")
        targets += _shortest_ends(found, everywhere) if name in groups or _also_in(others, name) else [name]
    return list(dict.fromkeys(targets))


def modules_to_save(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """The ends of module names by which PEFT finds the modules that are trained whole.

    Args:
        model: the base model, without an adapter; its modules are enough.
        wanted: ends of modules' names, wherever they begin, as PEFT takes them (``norm`` is ``input_layernorm`` as
            well); ``norms`` stands for all norms that text passes and that hold nothing but vectors, whatever the
            architecture calls them.

    Raises:
        ValueError: one of them is no module of this model, or one that holds something else than vectors.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    part = _text_part(model)
    text = [name for name in modules if name.startswith(part)]
    norms = [name for name in text if "Norm" in type(modules[name]).__name__ and _holds_vectors(modules[name])]
    ends: list[str] = []
    for name in wanted:
        found = norms if name == NORMS else [module for module in text if module.endswith(name)]
        if not found and name == NORMS:
            raise ValueError(f"lora.modules_to_save=[{NORMS}]: the norms of this model have no vectors to train")
        if not found:
            raise ValueError(
                f"lora.modules_to_save: {name!r} is the end of no module's name, such as {next(iter(norms), '')!r}"
            )
        for module in found:
            _check_vectors(module, modules[module])
        last = dict.fromkeys(module.rpartition(".")[2] for module in found)
        ends += _ends_of_no_other(found, modules, [*last] if name == NORMS else [name])
    return list(dict.fromkeys(ends))


def _holds_vectors(module: nn.Module) -> bool:
    return {parameter.ndim for parameter in module.parameters()} == {1}


def _check_vectors(name: str, module: nn.Module) -> None:
    if _holds_vectors(module):
        return
    size = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim != 1)
    if size == 0:
        raise ValueError(f"lora.modules_to_save: {name!r} has nothing to train; try [{NORMS}]")
    raise ValueError(
        f"lora.modules_to_save: {name!r} holds {size:,} values of matrices: modules of vectors alone, such as "
        f"[{NORMS}], are trained whole; a matrix is adapted by factors (lora.target_modules)"
    )


def _ends_of_no_other(wanted: Sequence[str], modules: Iterable[str], ends: Sequence[str]) -> list[str]:
    """The ends, or the wanted modules' full names where one ends another module's name as well: one of a vision tower,
    which gets no gradient from text."""
    return [*ends] if {name for name in modules if name.endswith(tuple(ends))} == {*wanted} else [*wanted]


def _also_in(others: Iterable[str], end: str) -> bool:
    return any(f".{layer}".endswith(f".{end}") for layer in others)


def fused_parts(config: PreTrainedConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parts]:
    """Which B factors hold the rows of several projections, and which rows are whose.

    Args:
        config: the base model's.
        shapes: PEFT tensor name -> shape.

    Returns:
        PEFT tensor name -> its parts (``q``, ``k``, ``v`` or ``gate``, ``up``); without the tensors that are of one
        piece, and those of architectures that this module does not know.
    """
    fused = {}
    for name, shape in shapes.items():
        module, _, factor = name.rpartition(".lora_")
        if factor.startswith("B.") and (parts := _parts(config, module.rpartition(".")[2], shape[0])) is not None:
            fused[name] = parts
    return fused


def _parts(config: PreTrainedConfig, layer: str, num_rows: int) -> Parts | None:
    if layer == _GATE_UP and num_rows % 2 == 0:
        half = num_rows // 2
        return {"gate": (range(half),), "up": (range(half, num_rows),)}
    interleaved = _INTERLEAVED.get(config.model_type) == layer
    if not interleaved and _STACKED.get(config.model_type) != layer:
        return None
    config = config.get_text_config()
    num_heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_kv_heads = (num_rows // width - num_heads) // 2
    if num_kv_heads < 1 or (num_heads + 2 * num_kv_heads) * width != num_rows:
        return None
    groups = num_kv_heads if interleaved else 1
    sizes = (width * num_heads // groups, *[width * num_kv_heads // groups] * 2)
    return _repeated(dict(zip("qkv", sizes, strict=True)), groups)


def _repeated(sizes: Mapping[str, int], groups: int) -> Parts:
    """Parts of these sizes, one after the other, over and over."""
    parts: dict[str, list[range]] = {name: [] for name in sizes}
    start = 0
    for _ in range(groups):
        for name, size in sizes.items():
            parts[name].append(range(start, start + size))
            start += size
    return {name: tuple(rows) for name, rows in parts.items()}


def _shortest_ends(wanted: Iterable[str], layers: Sequence[str]) -> list[str]:
    """Ends of names that fit all wanted layers and no other: ``q_proj``, or ``attn.c_proj`` where ``mlp.c_proj`` is."""
    chosen = set(wanted)
    others = [f".{layer}" for layer in layers if layer not in chosen]
    ends = []
    for layer in wanted:
        names = layer.split(".")
        candidates = (".".join(names[-length:]) for length in range(1, len(names) + 1))
        ends.append(next((end for end in candidates if not any(o.endswith(f".{end}") for o in others)), layer))
    return list(dict.fromkeys(ends))
