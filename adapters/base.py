"""The base model: a directory, a GGUF file or a name on the hub -> tokenizer, and weights or their shapes alone.

Knows transformers and bitsandbytes; must not know adapters. Weights are safetensors or nothing, and code that comes
with a model runs only where ``model.trust_remote_code`` says so. Whatever is wrong with a model ends in one line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from adapters.gguf import model_folder
from adapters.settings import ModelSettings, check_device, check_model, is_hub_name

if TYPE_CHECKING:  # models take seconds to load, for which a look at the data need not wait
    from transformers import PreTrainedModel

disable_progress_bar()  # a bar for every load would run over the rounds' own


_GRAPHS = 64
"""So many graphs of one layer may be compiled before torch gives up on it."""


def _compile_layers(base: PreTrainedModel) -> None:
    """Has torch compile every layer when it first runs. All share the code: a few graphs serve a model of any depth.

    Raises:
        ValueError: transformers does not mark the architecture's layers as such.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"model.compile=true: {type(base).__name__} has no layers that transformers marks as such")
    from torch._dynamo import config  # here, as it takes a second

    config.recompile_limit = max(config.recompile_limit, _GRAPHS)  # `compile` takes it as an argument in newer releases
    for layer in layers:
        # batches are as long as their longest window; training, evaluating and single windows have graphs of their own
        layer.compile(dynamic=True)


def resolve_device(settings: ModelSettings) -> torch.device:
    """Where the model is held. Raises ValueError: there is no such device here."""
    if (device := _named_device(settings)) is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= (found := torch.cuda.device_count()):
        raise ValueError(f"model.device={settings.device!r}: there are {found} GPUs here: give auto or cpu")
    return device


def _named_device(settings: ModelSettings) -> torch.device | None:
    """None: ``auto``."""
    check_device(settings.device)
    return None if settings.device == "auto" else torch.device(settings.device)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Raises ValueError: no model there, or one without a tokenizer."""
    with _in_one_line(settings):
        return AutoTokenizer.from_pretrained(**_source(settings))


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's config.json; all that is read, and from the hub all that is downloaded. Raises ValueError."""
    with _in_one_line(settings):
        return AutoConfig.from_pretrained(**_source(settings))


def max_positions(settings: ModelSettings) -> int | None:
    """The longest text in tokens that the model reads; None if it sets no limit. Raises ValueError: no model there."""
    found = getattr(load_config(settings).get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def check_vocabulary(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError: the tokenizer gives ids for which the model has no embedding."""
    rows = getattr(load_config(settings).get_text_config(), "vocab_size", None)
    if rows is not None and (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise ValueError(
            f"model.path={settings.path!r}: the tokenizer's largest token id is {largest}, the model's embedding has "
            f"{rows} rows: are the tokenizer's files those of this model?"
        )


def load_base(settings: ModelSettings) -> PreTrainedModel:
    """The base model with its weights: on the CPU, or if quantised where ``model.device`` says.

    Raises:
        ValueError: no model there, damaged or missing weights, an architecture that transformers does not know, or a
            quantisation, attention or compiler that cannot run here.
    """
    if settings.compile and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise ValueError(f"model.compile=true needs a C++ compiler, and there is no {compiler!r} here: install g++")
    from transformers import AutoModelForCausalLM

    with _in_one_line(settings):
        base, found = AutoModelForCausalLM.from_pretrained(
            dtype=getattr(torch, settings.dtype),
            attn_implementation=_attention(settings),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are told below, in one line
            output_loading_info=True,
            **_quantized(settings),
            **_source(settings),
        )
    if lacking := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise ValueError(
            f"model.path={settings.path!r} has no weight {lacking[0]!r} of the shape that config.json says "
            f"({len(lacking)} lacking in all): is the download complete?"
        )
    if is_quantized(base):
        _keep_gradients(base)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.compile:
        _compile_layers(base)
    return base


def empty_base(settings: ModelSettings) -> PreTrainedModel:
    """The base model's modules and shapes on the meta device; only config.json is read. Raises ValueError."""
    from transformers import AutoModelForCausalLM

    config = load_config(settings)
    with _in_one_line(settings), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config,
            dtype=getattr(torch, settings.dtype),
            attn_implementation="eager" if settings.attention == "eager" else None,
            trust_remote_code=settings.trust_remote_code,
        )


def is_quantized(base: PreTrainedModel) -> bool:
    """Whether its weights are quantised, here or before they were stored: then it stays on the device it is on."""
    return getattr(base, "hf_quantizer", None) is not None


def _source(settings: ModelSettings) -> dict[str, Any]:
    check_model(settings)
    return {
        "pretrained_model_name_or_path": model_folder(settings),
        "revision": settings.revision,
        "local_files_only": not is_hub_name(settings.path),
        "trust_remote_code": settings.trust_remote_code,
    }


def _quantized(settings: ModelSettings) -> dict[str, Any]:
    if settings.quantization == "none":
        return {}
    config = BitsAndBytesConfig(
        load_in_8bit=settings.quantization == "int8",
        load_in_4bit=settings.quantization == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": str(resolve_device(settings))}}


def _keep_gradients(base: PreTrainedModel) -> None:
    """The packing that evaluation on some CPUs prefers has no gradient, and training follows evaluation."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _attention(settings: ModelSettings) -> str | None:
    """As transformers calls it; None leaves the choice between sdpa and eager to the architecture."""
    chosen = None if settings.attention == "auto" else settings.attention
    if settings.attention == "auto" and settings.dtype != "float32" and _has_flash_attention(settings):
        chosen = "flash_attention_2" if empty_base(settings)._supports_flash_attn else None
    if chosen == "flash_attention_2":
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # transformers reads it at every backward pass
    return chosen


def _has_flash_attention(settings: ModelSettings) -> bool:
    return find_spec("flash_attn") is not None and resolve_device(settings).type == "cuda"


@contextmanager
def _in_one_line(settings: ModelSettings) -> Iterator[None]:
    """What transformers says over many lines and in many types of error, as one ValueError of one line."""
    try:
        yield
    except Exception as error:  # whatever a file that is missing, broken or of another program leads to
        text = str(error)
        if isinstance(error, ValueError) and text.startswith("model."):
            raise
        if isinstance(error, SafetensorError):
            raise ValueError(f"{_damaged_file(settings)} is damaged or not whole: download it again ({text})") from None
        raise ValueError(f"model.path={settings.path!r}: {_reason(settings, error)}") from None


def _damaged_file(settings: ModelSettings) -> str:
    for file in sorted(Path(model_folder(settings)).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return str(file)
    return f"a weights file of model.path={settings.path!r}"


def _reason(settings: ModelSettings, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "the model brings Python code of its own: model.trust_remote_code=true runs it, if you trust its authors"
    if "model type" in text or "Unrecognized model" in text:
        return f"transformers {transformers.__version__} does not know this architecture ({_first_line(text)})"
    if "no file named model.safetensors" in text or "does not appear to have a file named" in text:
        return f"there are no weights in the safetensors format ({_first_line(text)})"
    if "backend tokenizer" in text:
        return "there is no tokenizer beside the model that transformers can read"
    if isinstance(error, StrictDataclassError):
        return f"config.json is not as transformers wants it ({' '.join(text.split())})"
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        found = f"{type(error).__name__}: {_first_line(text)}"
        return f"transformers cannot use what config.json or the tokenizer's files say ({found}): are they the model's?"
    if is_hub_name(settings.path):
        return f"no such directory, and the Hugging Face hub does not give it ({_first_line(text)})"
    return _first_line(text)


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()
