"""Where the gradients of a LoRA factor will lie along its width, read off the base model's weights.

A factor's gradients lie where the network writes and reads: those of A in what reaches its layer, those of B in what
is read of its layer's output later. Both are told by Gram matrices of the weights around it, each of trace 1, summed:

    A of q, k, v      what q, k, v read, and what embedding and earlier layers wrote, times the norm's gain
    A of gate, up     the same of gate and up, with this layer's attention among what was written
    A of o, of down   what it reads, and what v, or gate and up, write
    B of q, of k      what it writes, and what the other writes, heads folded onto heads
    B of v            what it writes, and what o reads
    B of gate, up     what it writes, and what down reads
    B of o, of down   what it writes, and what all later layers and the unembedding read

Every node holds the weights, so none of this travels. It is computed in float64 from the checkpoint's own values, so
that machines agree far beyond what a transform needs, whatever quantisation they train in. Architectures other than
LLaMA's relatives have what their tensor's own weights say, or what a plug-in says of them (``Family``).

Shape suffixes: W width of one tensor, K directions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from adapters.base import load_config, resolve_device
from adapters.gguf import cache_folder, model_folder
from adapters.model import layer_of
from adapters.plugins import Plugins
from adapters.settings import ModelSettings

_LOG = logging.getLogger(__name__)

NUM_DIRECTIONS = 128
MAX_WIDTH = 8192
"""Wider tensors get no directions: their Gram matrices would take more than half a gigabyte each."""
_BEFORE_QUANTISATION = "codec.basis=model needs weights as they were before quantisation"
_VERSION = 2
_EXACT_WIDTH = 1024
_ITERATIONS, _SPARE = 12, 32
_WRITERS_AND_READERS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layers are as the table above has them, with norms that multiply by their weight."""
_INPUTS_FIRST = ("gpt2",)
"""Model types whose layers keep their weights as ``[inputs, outputs]``."""
_PLACE = re.compile(r"(.*layers\.)(\d+)\.(?:self_attn|mlp)\.([a-z]+)_proj")
_NOT_KEPT = "what the base model says of directions is not kept for the next run: %s"


class NoWeightsError(ValueError):
    """A checkpoint does not hold its weights as they were before quantisation, in safetensors."""


@dataclass(frozen=True)
class Wanted:
    """A LoRA factor, or of a fused one the part that lies in these rows of its layer's output."""

    name: str
    tensor: str
    rows: tuple[range, ...] | None = None

    @property
    def layer(self) -> str:
        """The full name of the layer that it adapts."""
        return layer_of(self.tensor)

    @property
    def is_a(self) -> bool:
        return ".lora_A." in self.tensor


@dataclass(frozen=True)
class Space:
    """The strongest directions ``[W, K]`` float32, orthonormal, and the share of the energy that each holds ``[K]``."""

    directions_WK: Tensor
    shares_K: Tensor


def spaces_of(settings: ModelSettings, wanted: Sequence[Wanted]) -> dict[str, Space]:
    """By name, without those that are too wide. Computed once a model and adapter, and kept in the user's cache.

    Raises:
        NoWeightsError: the checkpoint has no such weights.
    """
    files = _checkpoint(settings)
    dates = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    asked = [(one.name, one.tensor, str(one.rows)) for one in wanted]
    said = [_VERSION, NUM_DIRECTIONS, dates, asked, *_brought(load_config(settings).get_text_config().model_type)]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
    place = cache_folder() / "spaces" / f"{key}.safetensors"
    with ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(place.with_suffix(".lock")))
        except OSError as error:
            _LOG.warning(_NOT_KEPT, error)
            return _computed_from(files, settings, wanted)
        if place.is_file():
            try:
                return _load(place)
            except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
                _LOG.warning("%s is damaged and is made anew: %r", place, error)
        spaces = _computed_from(files, settings, wanted)
        try:
            _save(spaces, place)
        except (OSError, SafetensorError) as error:
            _LOG.warning(_NOT_KEPT, error)
        return spaces


def computed_spaces(settings: ModelSettings, wanted: Sequence[Wanted]) -> dict[str, Space]:
    """The same, computed now. Raises NoWeightsError: as ``spaces_of``."""
    return _computed_from(_checkpoint(settings), settings, wanted)


def _computed_from(files: Sequence[Path], settings: ModelSettings, wanted: Sequence[Wanted]) -> dict[str, Space]:
    weights = Weights(files, resolve_device(settings))
    with torch.inference_mode():
        return _computed(load_config(settings).get_text_config(), weights, wanted)


def _checkpoint(settings: ModelSettings) -> list[Path]:
    folder = Path(model_folder(settings))
    if not folder.is_dir():
        pattern = "model*.safetensors"
        folder = Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=[pattern]))
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise NoWeightsError(f"model.path={settings.path!r}: no model*.safetensors, which codec.basis=model reads")
    return files


def _brought(model_type: str) -> list[str]:
    """Whose ``Family`` serves it, if a plug-in's does."""
    return [PLUGINS.origin(model_type)] if model_type in PLUGINS.names else []


def _save(spaces: Mapping[str, Space], place: Path) -> None:
    """Factors that share a space share its tensors, in the file as in memory."""
    groups: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    for space in spaces.values():
        if id(space) not in groups:
            number = groups[id(space)] = len(groups)
            tensors |= {f"directions.{number}": space.directions_WK, f"shares.{number}": space.shares_K}
    names = {name: groups[id(space)] for name, space in spaces.items()}
    part = place.with_suffix(".part")
    save_file(tensors, part, {"names": json.dumps(names), "digest": _digest(tensors)})
    part.replace(place)


def _load(place: Path) -> dict[str, Space]:
    """Inverse of ``_save``. Raises ValueError, or what reading raises: the file is damaged."""
    tensors = load_file(place)
    with safe_open(place, "pt") as file:
        metadata = file.metadata() or {}
    names: dict[str, int] = json.loads(metadata["names"])
    if metadata["digest"] != _digest(tensors):
        raise ValueError("its digest is another one")
    spaces = {i: Space(tensors[f"directions.{i}"], tensors[f"shares.{i}"]) for i in {*names.values()}}
    return {name: spaces[number] for name, number in names.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].contiguous().cpu().numpy().data)
    return whole.hexdigest()


class Weights:
    """A checkpoint's matrices by the names of the model's layers, float64 as they are kept: ``[outputs, inputs]`` but
    for GPT-2's. One at a time."""

    def __init__(self, files: Iterable[Path], device: torch.device) -> None:
        self._device = device
        self._files: dict[str, Path] = {}
        for path in files:
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: str) -> bool:
        return self._key(name) is not None

    def __getitem__(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise NoWeightsError(f"the checkpoint has no {name}.weight: {_BEFORE_QUANTISATION}")
        with safe_open(self._files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if tensor.element_size() < 2 or not tensor.is_floating_point():
            raise NoWeightsError(f"the checkpoint's {key} is {tensor.dtype}: {_BEFORE_QUANTISATION}")
        return tensor.to(self._device, torch.float64)

    def _key(self, name: str) -> str | None:
        """A checkpoint of the bare decoder lacks the first part of its layers' names; one of several modalities has its
        parts in another order."""
        parts = name.split(".")
        ends = [".".join([*parts[first:], "weight"]) for first in range(len(parts))]
        if (exact := next((end for end in ends if end in self._files), None)) is not None:
            return exact
        alike = [key for key in self._files if sorted(key.split(".")) == sorted([*parts, "weight"])]
        return alike[0] if len(alike) == 1 else None


def _computed(config: PreTrainedConfig, weights: Weights, wanted: Sequence[Wanted]) -> dict[str, Space]:
    by_layer: dict[str, list[Wanted]] = {}
    for one in wanted:
        by_layer.setdefault(one.layer, []).append(one)
    found: dict[str, Space] = {}
    places = {layer: match for layer in by_layer if (match := _PLACE.fullmatch(layer))}
    own = _own_grams(weights, by_layer, config.model_type in _INPUTS_FIRST)
    grams: Grams
    if config.model_type in PLUGINS.names:
        grams = chain(PLUGINS.load(config.model_type)(weights, list(by_layer), config), own)
    elif config.model_type in _WRITERS_AND_READERS and len(places) == len(by_layer):
        root = next(iter(places.values()))[1]
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        grams = _llama_grams(weights, root, head_width)
    else:
        grams = own
    for layers, is_a, gram in grams:
        mine = [
            one for layer in layers for one in by_layer.get(layer, ()) if one.is_a == is_a and one.name not in found
        ]
        if not mine:
            continue
        gram_WW = gram()
        whole = _strongest(gram_WW) if len(gram_WW) <= MAX_WIDTH and any(one.rows is None for one in mine) else None
        for one in mine:
            if one.rows is not None:
                rows = torch.cat([torch.arange(run.start, run.stop, run.step) for run in one.rows]).to(gram_WW.device)
                if len(rows) <= MAX_WIDTH:
                    found[one.name] = _strongest(gram_WW[rows][:, rows])
            elif whole is not None:
                found[one.name] = whole
    return found


Grams = Iterable[tuple[list[str], bool, Callable[[], Tensor]]]
"""Layers, whether their A or their B is meant, and what computes the common Gram matrix ``[W, W]`` of these factors."""
Family = Callable[[Weights, Sequence[str], PreTrainedConfig], Grams]
"""What is known of the models of one type: the weights, the full names of the adapted layers, and the model's config ->
Gram matrices, of as many factors as one likes. The others have what their tensor's own weights say."""
PLUGINS = Plugins("cg_fedllm.spaces", own=lambda: _WRITERS_AND_READERS)
"""What other distributions bring: a ``Family`` by the name of its model type, as ``config.json`` has it."""


def _own_grams(weights: Weights, layers: Iterable[str], inputs_first: bool) -> Grams:
    """What a layer's own weights say."""
    for layer in layers:
        weight = weights[layer].T if inputs_first else weights[layer]
        yield [layer], True, partial(reads, weight)
        yield [layer], False, partial(writes, weight)


def _llama_grams(weights: Weights, root: str, head_width: int) -> Grams:
    """Forward through the layers with what was written so far, then back with what will be read."""
    count = next(i for i in range(10**6) if f"{root}{i}.self_attn.q_proj" not in weights)
    decoder = root.removesuffix("layers.")
    written = reads(weights[f"{decoder}embed_tokens"])
    for i in range(count):
        layer = _Layer(weights, f"{root}{i}", head_width)
        between = written + writes(layer.o)
        for factors, is_a in (("qkv", True), ("o", True), ("q", False), ("k", False), ("v", False)):
            yield [layer.name(which) for which in factors], is_a, partial(_gram, layer, factors[0], is_a, written)
        yield [layer.name("gate"), layer.name("up")], True, partial(_gram, layer, "gate", True, between)
        for factor, is_a in (("gate", False), ("up", False), ("down", True)):
            yield [layer.name(factor)], is_a, partial(_gram, layer, factor, is_a, between)
        written = between + writes(layer.down)
    later = reads(weights["lm_head" if "lm_head" in weights else f"{decoder}embed_tokens"] * weights[f"{decoder}norm"])
    for i in reversed(range(count)):
        layer = _Layer(weights, f"{root}{i}", head_width)
        yield [layer.name("down")], False, partial(_gram, layer, "down", False, later)
        later = later + total(*(reads(weight * layer.gain_of_mlp) for weight in (layer.gate, layer.up)))
        yield [layer.name("o")], False, partial(_gram, layer, "o", False, later)
        later = later + total(*(reads(weight * layer.gain_of_attention) for weight in (layer.q, layer.k, layer.v)))


class _Layer:
    """One layer of a relative of LLaMA, its matrices ``[outputs, inputs]``."""

    def __init__(self, weights: Weights, place: str, head_width: int) -> None:
        self._place = place
        self.head_width = head_width
        self.q, self.k, self.v, self.o = (weights[self.name(which)] for which in "qkvo")
        self.gate, self.up, self.down = (weights[self.name(which)] for which in ("gate", "up", "down"))
        self.gain_of_attention = weights[f"{place}.input_layernorm"]
        self.gain_of_mlp = weights[f"{place}.post_attention_layernorm"]

    def name(self, which: str) -> str:
        return f"{self._place}.{'self_attn' if which in 'qkvo' else 'mlp'}.{which}_proj"


def _gram(layer: _Layer, which: str, is_a: bool, around_WW: Tensor) -> Tensor:
    """The table at the top; ``around_WW``: what was written so far, or what will be read."""
    q, k, v, o = layer.q, layer.k, layer.v, layer.o
    match which, is_a:
        case "q", True:
            return total(total(*map(reads, (q, k, v))), _gained(around_WW, layer.gain_of_attention))
        case "gate", True:
            return total(total(*map(reads, (layer.gate, layer.up))), _gained(around_WW, layer.gain_of_mlp))
        case "o", True:
            return total(reads(o), writes(_repeated(v, o.shape[1], layer.head_width)))
        case "down", True:
            return total(reads(layer.down), total(*map(writes, (layer.gate, layer.up))))
        case "q", False:
            return total(writes(q), writes(_repeated(k, len(q), layer.head_width)))
        case "k", False:
            return total(writes(k), writes(_folded(q, len(k), layer.head_width)))
        case "v", False:
            return total(writes(v), writes(_folded(o.T, len(v), layer.head_width)))
        case (("gate" | "up"), False):
            return total(writes(layer.gate if which == "gate" else layer.up), reads(layer.down))
        case (("o" | "down"), False):
            return total(writes(o if which == "o" else layer.down), _normed(around_WW))
    raise AssertionError(which)


def _normed(gram_WW: Tensor) -> Tensor:
    return gram_WW / gram_WW.trace()


def reads(weight: Tensor) -> Tensor:
    """Gram matrix ``[inputs, inputs]``, of trace 1, of what a layer ``[outputs, inputs]`` reads."""
    return _normed(weight.T @ weight)


def writes(weight: Tensor) -> Tensor:
    """Gram matrix ``[outputs, outputs]``, of trace 1, of what a layer ``[outputs, inputs]`` writes."""
    return _normed(weight @ weight.T)


def total(*grams: Tensor) -> Tensor:
    """Their sum, of trace 1."""
    return _normed(torch.stack(grams).sum(0))


def _gained(gram_WW: Tensor, gain_W: Tensor) -> Tensor:
    return _normed(gain_W[:, None] * _normed(gram_WW) * gain_W)


def _repeated(rows: Tensor, count: int, width: int) -> Tensor:
    """Key-value heads -> one for each query head that shares it."""
    group = count // len(rows)
    return rows.view(-1, width, rows.shape[1]).repeat_interleave(group, 0).reshape(-1, rows.shape[1])


def _folded(rows: Tensor, count: int, width: int) -> Tensor:
    """Query heads -> those that share a key-value head side by side."""
    group = len(rows) // count
    heads = rows.reshape(-1, group, width, rows.shape[1]).transpose(1, 2)
    return heads.reshape(count, -1)


def _strongest(gram_WW: Tensor) -> Space:
    """Strongest first, each with its largest value positive."""
    width = len(gram_WW)
    count = min(NUM_DIRECTIONS, width)
    if width <= _EXACT_WIDTH:
        values, vectors = torch.linalg.eigh(gram_WW)
    else:  # block power iteration from a fixed start; what is wanted lies far above the rest
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(width, count + _SPARE, dtype=torch.float64, generator=generator).to(gram_WW.device)
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(gram_WW @ basis)[0]
        values, inner = torch.linalg.eigh(basis.T @ gram_WW @ basis)
        vectors = basis @ inner
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    directions = (vectors * torch.where(peaks < 0, -1.0, 1.0)).float().cpu().contiguous()
    return Space(directions, values.clamp_min(0).float().cpu())
