"""Adapters on disk, in PEFT's format: out with a model card, in with every check, and merged into their base model.

Plain LoRA only, with target modules as a list, no other trained modules and PEFT's own tensor names: what
``PeftModel.from_pretrained`` and vLLM both load (https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/). Knows
files and the model that an adapter belongs to; must not know runs: what a card says of one comes as text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from adapters.model import Adapter, adapter_shapes, set_adapter
from adapters.settings import LoraSettings

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def save_adapter(adapter: Mapping[str, Tensor], config: LoraConfig, facts: Mapping[str, str], folder: Path) -> None:
    """Writes the adapter as a PEFT directory with a model card.

    Args:
        adapter: as ``get_adapter`` gives it.
        config: that of its model, ``model.peft_config["default"]``.
        facts: what the card tells of the run, label -> text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path = public_name(str(config.base_model_name_or_path))
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))
    how = _LOAD_ADAPTER.format(base=config.base_model_name_or_path, rank=config.r)
    _card("LoRA adapter", config.base_model_name_or_path, "peft", facts, how).save(folder / CARD)


def load_adapter(folder: Path) -> tuple[LoraConfig, Adapter]:
    """Inverse of ``save_adapter``, for plain LoRA from anywhere: its configuration and its tensors.

    Raises:
        ValueError: a file is missing or damaged, or it is no plain LoRA.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            what = f"holds no {name}" if folder.is_dir() else "is no directory"
            raise ValueError(f"{folder} {what}: give a PEFT adapter directory, or the output folder of a finished run")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # a broken JSON, an unknown kind, a key that this PEFT does not know
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}".split("\n")[0]) from None
    if (beyond := _beyond_plain_lora(config)) is not None:
        raise ValueError(f"{folder} is no plain LoRA adapter: {beyond} is not served")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}; copy it again") from None
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def load_start(folder: Path, model: PeftModel) -> Adapter:
    """A saved adapter from which this model's training can start, its tensors in the model's order.

    Raises:
        ValueError: it cannot be read, or is of another rank, alpha, target modules or base model.
    """
    config, adapter = load_adapter(folder)
    own_config, own = model.peft_config["default"], adapter_shapes(model)
    for key, saved, wanted in (
        ("rank", config.r, own_config.r),
        ("alpha", config.lora_alpha, own_config.lora_alpha),
        ("target_modules", _modules(adapter), _modules(own)),
    ):
        if saved != wanted:
            said = f"[{','.join(saved)}]" if isinstance(saved, list) else saved
            raise ValueError(f"lora.start={folder} has another {key} than this run: give lora.{key}={said}")
    theirs, ours = (public_name(str(c.base_model_name_or_path)) for c in (config, own_config))
    if Path(theirs).name != Path(ours).name:
        raise ValueError(f"lora.start={folder} was trained on the base model {theirs!r}, this run is on {ours!r}")
    try:
        set_adapter(model, adapter)
    except ValueError as error:
        raise ValueError(f"lora.start={folder}: {error}") from None
    return {name: adapter[name] for name in own}


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, str], folder: Path) -> None:
    """Writes the base model with the adapter merged in, in the dtype of its weights, with its tokenizer and a card.

    The model is left merged.

    Raises:
        ValueError: the base weights are quantised, so that the sum could not be held.
    """
    base_name = public_name(str(model.peft_config["default"].base_model_name_or_path))
    if getattr(model.get_base_model(), "hf_quantizer", None) is not None:
        raise ValueError(
            f"{base_name} is loaded quantised, and an adapter can be merged into unquantised weights only: "
            "give --set model.quantization=none"
        )
    merged = model.merge_and_unload()
    merged.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    _card("Merged LoRA", base_name, "transformers", facts, _LOAD_MERGED).save(folder / CARD)


def lora_settings(config: LoraConfig) -> LoraSettings:
    """The settings with which ``load_model`` makes room for this adapter."""
    return LoraSettings(
        rank=config.r,
        alpha=float(config.lora_alpha),
        dropout=config.lora_dropout,
        target_modules=sorted(config.target_modules),
    )


def public_name(path: str) -> str:
    """A base model's name as others can use it: its name on the hub where the path shows it, else its path, relative
    to the current directory if it lies below it."""
    if cached := re.search(r"models--(.+?)--(.+?)/snapshots/", path):
        return "/".join(cached.groups())
    if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return Path(path).relative_to(Path.cwd()).as_posix()
    return path


def _beyond_plain_lora(config: PeftConfig) -> str | None:
    """The first thing of an adapter that changes more than plain LoRA does."""
    if not isinstance(config, LoraConfig):
        return f"peft_type={config.peft_type}"
    if not isinstance(config.target_modules, (list, set)):
        return f"target_modules={config.target_modules!r}"
    if config.bias != "none":
        return f"bias={config.bias}"
    more = (
        "modules_to_save",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "layer_replication",
    )
    return next((f"{key}={value}" for key in more if (value := getattr(config, key))), None)


def _modules(names: Iterable[str]) -> list[str]:
    """``...self_attn.q_proj.lora_A.weight`` -> ``q_proj``."""
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name})


def _card(title: str, base: str, library: str, facts: Mapping[str, str], how: str) -> ModelCard:
    on_hub = not Path(base).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    header = ModelCardData(
        base_model=base if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["lora", "federated-learning"],
    )
    rows = "".join(f"| {label} | {text} |\n" for label, text in {"base model": f"`{base}`", **facts}.items())
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n# {title} for {base}\n\n| | |\n|---|---|\n{rows}\n{how}")


_LOAD_ADAPTER = """\
## Loading

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

With vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules name=path/to/this/folder`, where the
rank is the next of those that vLLM offers (8, 16, 32, 64 ...).
"""

_LOAD_MERGED = """\
## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
