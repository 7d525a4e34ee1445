"""Adapters on disk, in PEFT's format: out with a model card, in with every check, and merged into their base model.

LoRA with target modules as a list, no other trained modules and PEFT's own tensor names: what
``PeftModel.from_pretrained`` loads, and vLLM too (https://docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/) but for
DoRA and for ranks or alphas that differ, which cards and programs say. Knows files and the model that an adapter
belongs to; must not know runs: what a card says of one comes as text.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from adapters.architectures import left_out
from adapters.files import CONFIG, WEIGHTS, check_adapter_files
from adapters.gguf import origin
from adapters.model import Adapter, adapter_shapes, merged, set_adapter
from adapters.settings import LoraSettings
from adapters.text import one_line

CARD = "README.md"
Sections = Mapping[str, Sequence[str]]
"""Of a model card, beside its table: title -> paragraphs of plain text."""


def save_adapter(
    adapter: Mapping[str, Tensor],
    config: LoraConfig,
    facts: Mapping[str, str],
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    served_by_vllm: bool = True,
    sections: Sections = MappingProxyType({}),
) -> None:
    """Writes the adapter as a PEFT directory with a model card; its files' modes follow the umask.

    Args:
        adapter: as ``get_adapter`` gives it.
        config: that of its model, ``model.peft_config["default"]``.
        facts: what the card tells of the run, label -> text.
        folder: made where it is not there; files of the same names in it are replaced.
        tokenizer: of the base model, written beside the adapter; None: there is none at hand.
        served_by_vllm: as ``served_by_vllm`` says; else the card warns, as it does of kinds that vLLM has not.
        sections: of the card, title -> paragraphs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(config)
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    config.base_model_name_or_path = public_name(str(config.base_model_name_or_path))
    save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / WEIGHTS, {"format": "pt"})
    config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    base = one_line(config.base_model_name_or_path)
    why = "" if served_by_vllm else "it holds the text part's names of a model that vLLM serves whole"
    why = beyond_vllm(lora_settings(config)) or why
    vllm = _NO_VLLM.format(why=why) if why else _VLLM.format(base=shlex.quote(base), rank=config.r)
    how = _LOAD_ADAPTER.format(base=json.dumps(base, ensure_ascii=False)) + vllm
    _card("LoRA adapter", base, "peft", facts, _text_of(sections) + how).save(folder / CARD)
    _follow_umask(folder)


def load_adapter(folder: Path) -> tuple[LoraConfig, Adapter]:
    """Inverse of ``save_adapter``, for LoRA from anywhere: its configuration and its tensors, in float32.

    Raises:
        ValueError: a file is missing or damaged, holds NaN or infinity, or is a kind of LoRA that is not served.
    """
    check_adapter_files(folder)
    config = _read_config(folder / CONFIG)
    if (beyond := _beyond_plain_lora(config)) is not None:
        raise ValueError(f"{folder} is no plain LoRA adapter: {one_line(beyond)} is not served")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}; copy it again") from None
    if broken := next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None):
        raise ValueError(f"{folder / WEIGHTS} holds NaN or infinity in {one_line(broken)!r}: its training diverged")
    if whole := next((name for name, tensor in tensors.items() if ".lora_" not in name and tensor.ndim != 1), None):
        raise ValueError(
            f"{folder} is no plain LoRA adapter: the matrix {one_line(whole)!r}, which is no factor (modules_to_save), "
            "is not served; modules of vectors, such as norms, are"
        )
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def load_start(folder: Path, model: PeftModel) -> Adapter:
    """A saved adapter from which this model's training can start, its tensors in the model's order.

    Raises:
        ValueError: it cannot be read, or is of another rank, alpha, kind, target modules or base model.
    """
    config, adapter = load_adapter(folder)
    own_config, own = model.peft_config["default"], adapter_shapes(model)
    theirs_of_key, ours_of_key = (
        {**dataclasses.asdict(lora_settings(one)), "target_modules": _modules(names)}
        for one, names in ((config, adapter), (own_config, own))
    )
    for key in _MUST_AGREE:
        if theirs_of_key[key] != ours_of_key[key]:
            said = _said(theirs_of_key[key])
            raise ValueError(f"lora.start={folder} has another {key} than this run: give lora.{key}={said}")
    theirs, ours = (public_name(str(c.base_model_name_or_path)) for c in (config, own_config))
    if Path(theirs).name != Path(ours).name:
        raise ValueError(f"lora.start={folder} was trained on the base model {theirs!r}, this run is on {ours!r}")
    try:
        set_adapter(model, adapter)
    except ValueError as error:
        raise ValueError(f"lora.start={folder}: {error}") from None
    return {name: adapter[name] for name in own}


def save_merged(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, str],
    folder: Path,
    sections: Sections = MappingProxyType({}),
) -> None:
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
    merged(model).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    _card("Merged LoRA", base_name, "transformers", facts, _text_of(sections) + _LOAD_MERGED).save(folder / CARD)
    _follow_umask(folder)


def lora_settings(config: LoraConfig) -> LoraSettings:
    """The settings with which ``load_model`` makes room for this adapter."""
    return LoraSettings(
        rank=config.r,
        alpha=float(config.lora_alpha),
        dropout=config.lora_dropout,
        target_modules=sorted(config.target_modules),
        rank_pattern=dict(config.rank_pattern or {}),  # older releases wrote null
        alpha_pattern={pattern: float(alpha) for pattern, alpha in (config.alpha_pattern or {}).items()},
        rslora=config.use_rslora,
        dora=config.use_dora,
        modules_to_save=sorted(config.modules_to_save or ()),
        local=sorted(config.exclude_modules or ()),
    )


def beyond_vllm(lora: LoraSettings) -> str | None:
    """What of an adapter vLLM does not apply, in a few words; None: it applies all of it.

    Its ``PEFTHelper`` refuses DoRA and modules that are trained whole, and has one rank and one alpha for all layers:
    patterns it would leave out in silence.
    """
    if lora.dora:
        return "it is DoRA, which vLLM refuses"
    if lora.modules_to_save:
        return "it holds modules that were trained whole, which vLLM refuses"
    if lora.rank_pattern or lora.alpha_pattern:
        return "its layers differ in rank or alpha, and vLLM takes one of each for all"
    return None


def served_by_vllm(config: PreTrainedConfig, names: Iterable[str]) -> bool:
    """Whether vLLM finds the layers of an adapter by its tensors' names.

    vLLM serves a model by the architecture that config.json names. Where that is one of several modalities, it maps the
    names ``model.language_model...`` of that architecture to its own (``WeightsMapper`` in ``vllm/model_executor``);
    ``AutoModelForCausalLM`` takes the text part alone of some (Qwen3.5, Llama 4), and its names have no such part.
    """
    whole = any(name.endswith("ForConditionalGeneration") for name in config.architectures or ())
    return not whole or any(".language_model." in name for name in names)


def what_to_know(model: PeftModel, config: PreTrainedConfig, lora: LoraSettings) -> list[str]:
    """What a user would expect of an adapter and does not get, known before any training; one line each.

    Args:
        model: with the adapter in it; its shapes are enough (``empty_model``).
        config: the base model's config.json, which names all of a model of which ``model`` may be the text part.
        lora: the settings of the adapter.
    """
    lines = [left_out(model.get_base_model(), lora.target_modules)]
    if lora.local:
        lines.append(
            "lora.local: some layers stay on the nodes; the server's held-out loss is that of the others alone, and "
            "the adapter that it writes has only those (python -m client.personal joins a node's own)"
        )
    if not served_by_vllm(config, adapter_shapes(model)):
        lines.append("vLLM does not apply adapters of this model's text part by their names: export with --merged")
    if (why := beyond_vllm(lora)) is not None:
        lines.append(f"vLLM does not apply this adapter ({why}): export with --merged")
    return [line for line in lines if line is not None]


def public_name(path: str) -> str:
    """A base model's name as others can use it: its name on the hub where the path shows it, else its path, relative
    to the current directory if it lies below it."""
    if cached := re.search(r"models--(.+?)--(.+?)/snapshots/", path):
        return "/".join(cached.groups())
    if Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return Path(path).relative_to(Path.cwd()).as_posix()
    return path


_MUST_AGREE = ("rank", "alpha", "rslora", "dora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_modules")
"""What a run and the adapter that it starts from have in common."""
_PLAIN = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",  # as a list: checked apart
    "exclude_modules",  # the same
    "fan_in_fan_out",  # PEFT sets it anew from the layers that it finds
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",  # of vectors alone: checked apart
    "init_lora_weights",  # some values of it change the base, too: checked apart
    "task_type",  # checked apart
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "peft_type",
    "peft_version",
    "auto_mapping",
}
"""The fields of PEFT's ``LoraConfig`` that are served. Any other, of a later PEFT too, is refused unless it has
its default."""
_INITIAL_VALUES = (True, False, None, "gaussian", "orthogonal")
"""Of ``init_lora_weights``: those that draw A and B and leave the base as it is (PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA
train beside a changed base; MiCA and EVA choose directions that loading would choose again)."""


def _read_config(path: Path) -> PeftConfig:
    """Raises ValueError: it is no PEFT configuration, or says something that the installed PEFT does not know."""
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
        said = json.loads(path.read_text())
    except Exception as error:  # a broken JSON, an unknown kind, a value that its checks refuse
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(config, LoraConfig):
        return config
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := next((key for key, value in said.items() if key not in known and value), None):  # PEFT drops them
        raise ValueError(f"{path} says {one_line(unknown)!r}, which peft {version('peft')} does not know: not served")
    return config


def _beyond_plain_lora(config: PeftConfig) -> str | None:
    """The first thing of an adapter that changes more than plain LoRA does."""
    if not isinstance(config, LoraConfig):
        return f"peft_type={config.peft_type}"
    if not isinstance(config.target_modules, (list, set)):
        return f"target_modules={config.target_modules!r}"
    if isinstance(config.exclude_modules, str):
        return f"exclude_modules={config.exclude_modules!r}"
    if config.task_type not in (None, "CAUSAL_LM"):
        return f"task_type={config.task_type}"
    if config.init_lora_weights not in _INITIAL_VALUES:
        return (
            f"init_lora_weights={config.init_lora_weights!r} (PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) makes plain LoRA of some such adapters)"
        )
    plain = LoraConfig()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(plain, field.name, None)
        if field.name not in _PLAIN and value != default and (value or default):  # older releases wrote null for {}
            return f"{field.name}={value}"
    return None


_MEANT, _BACKSLASH = re.compile(r"([()\[\]{}:=,\s\\])"), r"\\\1"
"""What Hydra takes for its own in a key, unless a backslash stands before it."""


def _said(value: object) -> str:
    """As the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{_MEANT.sub(_BACKSLASH, key)}: {one}" for key, one in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    of_base = {"base model": base} | ({"made of": made_of} if (made_of := origin(base)) is not None else {})
    rows = "".join(f"| {_escaped(key)} | {_escaped(text)} |\n" for key, text in {**of_base, **facts}.items())
    return ModelCard(
        f"---\n{header.to_yaml()}\n---\n\n# {title} for {_escaped(base)}\n\n| | |\n|---|---|\n{rows}\n{how}"
    )


def _text_of(sections: Sections) -> str:
    parts = (f"## {_escaped(title)}\n\n" + "\n\n".join(map(_escaped, texts)) for title, texts in sections.items())
    return "".join(f"{part}\n\n" for part in parts)


def _escaped(text: str) -> str:
    """Text of a foreign file as text of a Markdown table: no markup, no HTML, no end of a cell or line."""
    return re.sub(r"([\\`*\[\]|!])", r"\\\1", one_line(text).replace("&", "&amp;").replace("<", "&lt;"))


def _follow_umask(folder: Path) -> None:
    """Gives all files the mode of new ones: safetensors makes files that their owner alone can read."""
    os.umask(umask := os.umask(0))
    for file in folder.iterdir():
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)


_LOAD_ADAPTER = """\
## Loading

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
_VLLM = """
With vLLM: `vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules name=path/to/this/folder`, where the
rank is the next of those that vLLM offers (8, 16, 32, 64 ...).
"""

_NO_VLLM = """
vLLM does not apply this adapter: {why}. Merge it instead.
"""
_LOAD_MERGED = """\
## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
