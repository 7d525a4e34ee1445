"""rsLoRA, DoRA, ranks and alphas by layer: through layout, codecs and a federated run, and out again as PEFT has it."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import heavy_tailed_update
from hydra.core.override_parser.overrides_parser import OverridesParser
from peft import PeftModel
from safetensors.torch import load_file
from test_federation import run, settings_for
from transformers import AutoModelForCausalLM

from adapters.export import load_start, save_adapter
from adapters.finetune import finetune
from adapters.model import adapter_parts, adapter_shapes, empty_model, get_adapter, load_model
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, check_lora
from adapters.windows import Windows
from client.private import Guard
from conf.basis import priors_of
from conf.schema import Settings, changed, check_settings
from gradcodec.build import build_codec
from gradcodec.exchange import decode_update, encode_update
from gradcodec.fidelity import fidelity
from gradcodec.layout import Layout
from gradcodec.registry import codec_names, entry_of
from gradcodec.settings import CodecSettings
from server.evaluate import Evaluator
from server.plan import plan_of
from tasks.windows import heldout_loss

BASE = "assets/tiny-llama"
MAGNITUDE = ".lora_magnitude_vector"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.0\..*": 2, "q_proj": 4},
    "alpha_pattern": {"v_proj": 4.0},
    "rslora": True,
}
VECTORS = {"a.lora_A.weight": (4, 64), "a.lora_B.weight": (48, 4), "a.lora_magnitude_vector": (48,)}


def test_scales_and_ranks_are_those_of_the_patterns() -> None:
    model = load_model(ModelSettings(), LoraSettings(rank=8, alpha=16.0, **PATTERNS), seed=0)
    layers = {
        name.removeprefix("base_model.model.model.layers."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    for name, rank, alpha in (
        ("0.self_attn.q_proj", 2, 16.0),  # both patterns fit: the first counts
        ("0.self_attn.v_proj", 2, 4.0),
        ("1.self_attn.q_proj", 4, 16.0),
        ("1.self_attn.v_proj", 8, 4.0),
        ("1.self_attn.o_proj", 8, 16.0),
    ):
        layer = layers[name]
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / math.sqrt(rank))
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    assert layout.rank == 8
    assert layout.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank_pattern": {"(": 4}}, r"lora\.rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, r"lora\.rank_pattern: 'q_proj' has rank 0"),
        ({"alpha_pattern": {"q_proj": -1.0}}, r"lora\.alpha_pattern: 'q_proj' has alpha -1\.0"),
        ({"alpha_pattern": {"q_proj": math.nan}}, r"lora\.alpha_pattern: 'q_proj' has alpha nan"),
    ],
)
def test_patterns_that_mean_nothing_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_lora(LoraSettings(**change))


def test_a_pattern_of_no_adapted_layer_is_refused() -> None:
    for key, value in (("rank_pattern", 4), ("alpha_pattern", 4.0)):
        lora = LoraSettings(**{key: {"up_proj": value}})
        with pytest.raises(ValueError, match=rf"lora\.{key}: 'up_proj' is the end of no adapted layer's name, such as"):
            empty_model(ModelSettings(), lora)


def test_patterns_come_from_the_command_line_and_travel() -> None:
    settings = changed(
        Settings(), ["lora.rank_pattern={q_proj: 4, 'layers\\.0\\..*': 2}", "lora.alpha_pattern={k_proj: 8}"]
    )
    assert settings.lora.rank_pattern == {"q_proj": 4, r"layers\.0\..*": 2}
    assert Settings.from_json(settings.to_json()) == settings
    with pytest.raises(ValueError, match=r"lora\.rank_pattern.*'many'"):
        changed(Settings(), ["lora.rank_pattern={q_proj: many}"])


def test_a_start_says_its_patterns_as_the_command_line_takes_them(tmp_path: Path) -> None:
    patterns = {r"layers\.[01]\..*": 4, "(q|k)_proj": 2}
    made = load_model(ModelSettings(), LoraSettings(rank_pattern=patterns), seed=0)
    save_adapter(get_adapter(made), made.peft_config["default"], {}, tmp_path / "made")
    with pytest.raises(ValueError, match=r"has another rank_pattern than this run: give lora\.rank_pattern=") as error:
        load_start(tmp_path / "made", load_model(ModelSettings(), LoraSettings(), seed=0))
    (said,) = shlex.split(str(error.value).rpartition("give ")[2])
    assert OverridesParser.create().parse_override(said).value() == patterns


def test_a_vector_is_a_block_of_one_row_and_comes_back_as_it_was() -> None:
    layout = Layout.of(VECTORS)
    update = {name: torch.randn(shape) for name, shape in VECTORS.items()}
    assert (layout.shapes, layout.num_parameters) == (VECTORS, 4 * 64 + 4 * 48 + 48)
    blocks_RC = layout.to_blocks(update)
    (block,) = (block for block in layout.blocks if block.is_vector)
    assert torch.equal(blocks_RC[0, block.start : block.stop], update["a.lora_magnitude_vector"])
    assert not blocks_RC[1:, block.start : block.stop].any()
    back = layout.to_update(blocks_RC)
    assert all(torch.equal(back[name], update[name]) for name in VECTORS)
    assert Layout.of({**VECTORS, "a.lora_magnitude_vector": (1, 48)}).id != layout.id


WITHOUT_TRAINING = {name for name in codec_names() if not entry_of(name).needs_artifact} | {"learned"}


@pytest.mark.parametrize("name", sorted(WITHOUT_TRAINING))
def test_every_codec_serves_vectors_and_loses_nothing(name: str) -> None:
    layout = Layout.of(VECTORS)
    codec, vector = build_codec(CodecSettings(name), layout), "a.lora_magnitude_vector"

    def update_of(seed: int) -> dict[str, torch.Tensor]:
        matrices = heavy_tailed_update(seed, {key: shape for key, shape in VECTORS.items() if key != vector})
        spread = torch.cat([tensor.flatten() for tensor in matrices.values()]).std()
        noise = torch.randn(VECTORS[vector], generator=torch.Generator().manual_seed(seed))
        return {**matrices, vector: spread * noise}

    update, side = update_of(0), codec.side_information(layout.to_blocks(update_of(1)))
    payload, residual_RC = encode_update(update, None, codec=codec, max_bytes=layout.num_parameters // 2, side=side)
    decoded = decode_update(payload, codec=codec, side=side)
    assert residual_RC is not None
    torch.testing.assert_close(layout.to_blocks(decoded) + residual_RC, layout.to_blocks(update), rtol=0, atol=1e-6)
    if name != "b-only":  # which sends no vector, and is refused with lora.dora
        assert fidelity(layout.to_blocks(update), layout.to_blocks(decoded)).cosine > 0.5
    if name in ("learned", "rotated", "identity", "int8", "topk"):
        assert torch.cosine_similarity(decoded[vector], update[vector], dim=0) > 0.5


def test_the_base_model_says_nothing_of_where_magnitudes_move() -> None:
    model = empty_model(ModelSettings(path=BASE), LoraSettings(dora=True, target_modules=["q_proj"]))
    layout = Layout.of(adapter_shapes(model))
    priors = priors_of(ModelSettings(path=BASE), layout)
    assert priors.keys() == {block.name for block in layout.blocks if MAGNITUDE not in block.name}


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict[str, Any]]:
    return {"patterns": PATTERNS, "dora": {"dora": True, "rank_pattern": {"q_proj": 4}}}


@pytest.mark.parametrize("down_bits", [None, 1.0])
@pytest.mark.parametrize("kind", ["patterns", "dora"])
def test_a_coded_run_of_it_learns_and_its_adapter_is_pefts(
    tmp_path: Path, kinds: dict[str, dict[str, Any]], kind: str, down_bits: float | None
) -> None:
    changes = {f"lora__{key}": value for key, value in kinds[kind].items()}
    settings = settings_for(tmp_path, "run", codec__name="learned", codec__bits=1.0, **changes)
    settings.codec.down_bits = down_bits
    check_settings(settings)
    results = run(settings, tmp_path)
    assert not results.faults
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.02
    assert plan_of(settings).layout.num_parameters == results.num_parameters
    assert all(uplink.payload_bytes <= plan_of(settings).payload_bytes for uplink in results.uplinks)  # type: ignore[operator]
    folder = tmp_path / "run" / "adapter"
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    heldout = Evaluator(results.settings).heldout
    assert heldout_loss(loaded, heldout) == pytest.approx(results.heldout_loss[-1], abs=1e-5)
    merged = loaded.merge_and_unload()
    assert heldout_loss(merged, heldout) == pytest.approx(results.heldout_loss[-1], abs=1e-4)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["use_rslora"]) == (kinds[kind]["rank_pattern"], kind == "patterns")
    assert "vLLM does not apply this adapter: it" in (folder / "README.md").read_text()
    if kind == "dora":
        last, first = load_file(folder / "adapter_model.safetensors"), Evaluator(results.settings).seeded
        moved = [(last[name] - first[name]).abs().max() for name in first if name.endswith(MAGNITUDE)]
        assert len(moved) == 16 and all(bool(one > 1e-5) for one in moved)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_dora_trains_on_quantised_bases(quantization: str) -> None:
    lora = LoraSettings(rank=4, dora=True, train="b", target_modules=["q_proj"])
    model = load_model(ModelSettings(quantization=quantization, device="cpu"), lora, seed=0)
    windows = Windows.whole(torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(0)))
    training = TrainSettings(update="delta", lr=0.01, steps=2, batch_size=2, micro_batch_size=2)
    update, loss = finetune(model, get_adapter(model), windows, training, seed=0)
    assert math.isfinite(loss)
    for name, change in update.items():
        assert bool(change.isfinite().all()) and bool(change.any()) == (".lora_A." not in name)


def test_windows_pass_one_by_one_where_hooks_see_no_magnitudes(tmp_path: Path) -> None:
    settings = Settings()
    settings.privacy = replace(settings.privacy, name="record_dp", noise_multiplier=1.0, clip=1.0)
    for dora in (False, True):
        settings.lora.dora = dora
        guard = Guard(settings, 100, tmp_path / str(dora), 0)
        assert guard.protection(b"secret").one_by_one == dora


def test_b_only_and_dora_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.dora=true does not go with codec=b-only"):
        check_settings(settings_for(tmp_path, "run", codec__name="b-only", lora__dora=True))
