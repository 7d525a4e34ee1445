"""What the estimate of memory says, against real models and a measured peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OlmoConfig, Qwen2Config

from adapters.base import load_base
from adapters.finetune import finetune
from adapters.footprint import check_fits, estimate_evaluation, estimate_memory, free_bytes
from adapters.model import adapter_shapes, empty_model, get_adapter, load_model
from adapters.settings import LoraSettings, ModelSettings, TrainSettings
from adapters.windows import Windows
from bench.speed import codec_for, layout_of, update_of
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.registry import entry_of
from gradcodec.settings import CodecSettings
from tasks.windows import heldout_loss

TRAINING = TrainSettings(steps=1, batch_size=8, micro_batch_size=8)
CONFIGS = {
    "qwen2": Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=512, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt2": GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4),
    "olmo": OlmoConfig(  # its norms have no weights
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    ),
}  # fmt: skip


def held_bytes(base: torch.nn.Module, quantization: str) -> int:
    total = 0
    for parameter in base.parameters():
        total += parameter.numel() * (
            4 if quantization != "none" and parameter.is_floating_point() else parameter.itemsize
        )
        if parameter.dtype == torch.int8:
            total += parameter.SCB.nbytes  # type: ignore[attr-defined]
        elif (state := getattr(parameter, "quant_state", None)) is not None:
            outer = state.state2
            total += sum(t.nbytes for t in (state.absmax, state.code, state.offset, outer.absmax, outer.code))
    return total


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_weights_are_exact(name: str, quantization: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), dtype="bfloat16", quantization=quantization)
    estimate = estimate_memory(settings, LoraSettings(), TRAINING, 32)
    assert estimate.weights == held_bytes(load_base(settings), quantization)


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({}, 1.15),
        ({"dtype": "bfloat16"}, 1.15),
        ({"attention": "eager"}, 1.35),
        ({"gradient_checkpointing": True}, 1.5),
        ({"quantization": "nf4"}, 1.15),
        ({"quantization": "int8"}, 1.15),
        ({"dora": True}, 1.15),
        ({"dora": True, "dtype": "bfloat16"}, 1.15),
        ({"dora": True, "quantization": "nf4"}, 1.25),
        ({"rank_pattern": {"q_proj": 64}}, 1.15),
        ({"modules_to_save": ["norms"]}, 1.15),
        ({"modules_to_save": ["norms"], "dtype": "bfloat16"}, 1.15),
    ],
)
def test_the_estimate_is_near_the_peak_that_is_measured(change: dict[str, Any], most: float) -> None:
    lora = LoraSettings(**{key: change[key] for key in ("dora", "rank_pattern", "modules_to_save") if key in change})
    settings = ModelSettings(device="cpu", **{key: change[key] for key in change if not hasattr(lora, key)})
    model = load_model(settings, lora, seed=0)
    windows, adapter = Windows.whole(torch.randint(1, 1024, (8, 128))), get_adapter(model)
    peak = peak_of(lambda: finetune(model, adapter, windows, TRAINING, seed=0))
    estimate = estimate_memory(settings, lora, TRAINING, 128)
    assert 0.9 * peak < estimate.total - estimate.weights < most * peak


@pytest.mark.parametrize("change", [{}, {"dtype": "bfloat16"}, {"quantization": "nf4"}])
def test_what_evaluating_takes_is_near_the_peak_that_is_measured(change: dict[str, object]) -> None:
    settings = ModelSettings(device="cpu", **change)  # type: ignore[arg-type]
    model = load_model(settings, LoraSettings(), seed=0)
    windows = Windows.whole(torch.randint(1, 1024, (16, 128)))
    peak = peak_of(lambda: heldout_loss(model, windows, TRAINING.micro_batch_size))
    estimate = estimate_evaluation(settings, LoraSettings(), TRAINING, 128)
    assert 0.9 * peak < estimate.total - estimate.weights - estimate.adapter < 1.5 * peak


def test_what_the_codec_takes_is_near_the_peak_that_is_measured() -> None:
    layout = layout_of("7b", rank=8)
    codec = codec_for(CodecSettings(), layout)
    update, carried_RC = update_of(layout), layout.to_blocks(update_of(layout, seed=1))
    update_bytes, budget = 4 * layout.num_parameters, max_payload_bytes(0.5, layout.num_parameters)
    encoding = update_bytes + peak_of(lambda: encode_update(update, carried_RC, codec=codec, max_bytes=budget))
    payload, _ = encode_update(update, carried_RC, codec=codec, max_bytes=budget)
    decoding = peak_of(lambda: decode_update(payload, codec=codec))
    entry = entry_of("learned")
    assert 0.75 * entry.encoding_updates * update_bytes < encoding < entry.encoding_updates * update_bytes
    assert 0.65 * entry.decoding_updates * update_bytes < decoding <= entry.decoding_updates * update_bytes


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of the host that it held at once and did not hold before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_what_a_client_can_change_lowers_the_estimate() -> None:
    settings = ModelSettings(path="assets/geometries/llama-7b", dtype="bfloat16")
    whole = estimate_memory(settings, LoraSettings(), TRAINING, 512)
    for change in ({"quantization": "nf4"}, {"gradient_checkpointing": True}):
        changed = dataclasses.replace(settings, **change)
        assert estimate_memory(changed, LoraSettings(), TRAINING, 512).total < whole.total
    smaller = dataclasses.replace(TRAINING, micro_batch_size=4)
    assert estimate_memory(settings, LoraSettings(), smaller, 512).activations == whole.activations // 2
    assert estimate_memory(settings, LoraSettings(), TRAINING, 256).logits == whole.logits // 2


@pytest.mark.parametrize(
    ("geometry", "num_weights", "num_values"),
    [
        ("llama-7b", 6_738_415_616, 8_388_608),
        ("llama-13b", 13_015_864_320, 13_107_200),
        ("llama-70b", 68_976_648_192, 32_768_000),
        ("qwen2.5-1.5b", 1_543_714_304, 2_179_072),
    ],
)
def test_geometries_have_the_published_numbers_of_parameters(geometry: str, num_weights: int, num_values: int) -> None:
    model = empty_model(ModelSettings(path=f"assets/geometries/{geometry}"), LoraSettings())
    assert sum(rows * columns for rows, columns in adapter_shapes(model).values()) == num_values
    assert sum(parameter.numel() for parameter in model.parameters()) - num_values == num_weights


def test_a_model_that_does_not_fit_is_refused_with_what_would_help() -> None:
    settings = ModelSettings(path="assets/geometries/llama-70b")
    device = torch.device("cpu")
    huge = estimate_memory(settings, LoraSettings(), TRAINING, 4096)
    with pytest.raises(ValueError, match=r"training needs about .* try model\.gradient_checkpointing=true"):
        check_fits(huge, device)
    check_fits(estimate_memory(ModelSettings(), LoraSettings(), TRAINING, 64), device)
    free = free_bytes(device)
    assert free is None or free > 0
