"""rsLoRA, DoRA, ranks and alphas by layer, norms trained whole: through layout, codecs and a federated run, and out
again as PEFT has it."""

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
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CohereConfig,
    Gemma3Config,
    GPT2Config,
    OlmoConfig,
)

from adapters.architectures import modules_to_save
from adapters.export import load_start, save_adapter, save_merged
from adapters.finetune import finetune
from adapters.model import adapter_parts, adapter_shapes, add, empty_model, get_adapter, load_model, merged, set_adapter
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, check_lora
from adapters.windows import Windows
from client.private import Guard
from conf.basis import priors_of
from conf.checks import check_settings
from conf.schema import Settings, changed
from gradcodec.build import build_codec
from gradcodec.exchange import decode_update, encode_update
from gradcodec.fidelity import fidelity
from gradcodec.layout import Layout
from gradcodec.registry import codec_names, entry_of
from gradcodec.settings import CodecSettings
from server.plan import plan_of
from server.run.evaluate import Evaluator
from server.run.outline import Outline
from tasks.windows import heldout_loss

BASE = "assets/tiny-llama"
MAGNITUDE = ".lora_magnitude_vector"
PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.0\..*": 2, "q_proj": 4},
    "alpha_pattern": {"v_proj": 4.0},
    "rslora": True,
}
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
VECTOR_KINDS: list[dict[str, Any]] = [{"dora": True}, {"modules_to_save": ["norms"]}]
VECTORS: dict[str, tuple[int, ...]] = {
    "a.lora_A.weight": (4, 64),
    "a.lora_B.weight": (48, 4),
    "a.lora_magnitude_vector": (48,),
}


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
    ranks, alphas = LoraSettings(rank_pattern={"up_proj": 4}), LoraSettings(alpha_pattern={"up_proj": 4.0})
    for key, lora in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
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
    payload, residual = encode_update(update, None, codec=codec, max_bytes=layout.num_parameters // 2, side=side)
    decoded = decode_update(payload, codec=codec, side=side)
    carried_RC = layout.to_blocks(decoded) + residual.error_RC
    torch.testing.assert_close(carried_RC, layout.to_blocks(update), rtol=0, atol=1e-6)
    if name != "b-only":  # which sends no vector, and is refused with lora.dora
        # a quarter of the coordinates along random directions (projection) keeps half
        assert fidelity(layout.to_blocks(update), layout.to_blocks(decoded)).cosine > 0.45
    if name in ("learned", "rotated", "identity", "int8", "topk"):
        assert torch.cosine_similarity(decoded[vector], update[vector], dim=0) > 0.5


def test_the_base_model_says_nothing_of_where_magnitudes_move() -> None:
    model = empty_model(ModelSettings(path=BASE), LoraSettings(dora=True, target_modules=["q_proj"]))
    layout = Layout.of(adapter_shapes(model))
    priors = priors_of(ModelSettings(path=BASE), layout)
    assert priors.keys() == {block.name for block in layout.blocks if MAGNITUDE not in block.name}


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict[str, Any]]:
    return {
        "patterns": PATTERNS,
        "dora": {"dora": True, "rank_pattern": {"q_proj": 4}},
        "norms": {"modules_to_save": ["norms"], "rank_pattern": {"q_proj": 4}},
    }


@pytest.mark.parametrize(("kind", "down_bits"), [("patterns", None), ("dora", 1.0), ("norms", None), ("norms", 1.0)])
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
    assert config["modules_to_save"] == (NORMS if kind == "norms" else None)
    assert "vLLM does not apply this adapter: it" in (folder / "README.md").read_text()
    if kind != "patterns":
        last, first = load_file(folder / "adapter_model.safetensors"), Evaluator(results.settings).seeded
        moved = [(last[name] - first[name]).abs().max() for name in first if first[name].ndim == 1]
        assert len(moved) == (16 if kind == "dora" else 9) and all(bool(one > 1e-5) for one in moved)


def test_dora_trains_on_a_base_of_four_bits_and_not_of_eight() -> None:
    lora = LoraSettings(rank=4, dora=True, train="b", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"lora\.dora=true does not go with model\.quantization=int8"):
        load_model(ModelSettings(quantization="int8", device="cpu"), lora, seed=0)
    model = load_model(ModelSettings(quantization="nf4", device="cpu"), lora, seed=0)
    windows = Windows.whole(torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(0)))
    training = TrainSettings(update="delta", lr=0.01, steps=2, batch_size=2, micro_batch_size=2)
    update, loss = finetune(model, get_adapter(model), windows, training, seed=0)
    assert math.isfinite(loss)
    for name, change in update.items():
        assert bool(change.isfinite().all()) and bool(change.any()) == (".lora_A." not in name)


@pytest.mark.parametrize("held", [{}, {"dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}])
def test_norms_train_in_float32_whatever_the_base_is_held_in(held: dict[str, str], tmp_path: Path) -> None:
    settings = ModelSettings(device="cpu", **held)  # type: ignore[arg-type]
    model = load_model(settings, LoraSettings(modules_to_save=["norms"]), seed=0)
    adapter = get_adapter(model)
    norms = {name for name, tensor in adapter.items() if tensor.ndim == 1}
    weights = load_file(f"{BASE}/model.safetensors")
    assert all(torch.equal(adapter[name], weights[name.removeprefix("base_model.model.")].float()) for name in norms)
    windows = Windows.whole(torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(0)))
    training = TrainSettings(update="delta", lr=0.01, steps=2, batch_size=2, micro_batch_size=2, weight_decay=1e-9)
    update, _ = finetune(model, adapter, windows, training, seed=0)
    assert len(norms) == 9
    assert all(bool(update[name].isfinite().all() and update[name].any()) for name in norms)
    if "quantization" in held:
        return
    set_adapter(model, add(adapter, update))
    adapted = model.eval()(input_ids=windows.ids).logits
    save_merged(model, AutoTokenizer.from_pretrained(BASE), {}, tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        getattr(torch, settings.dtype)
    }
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=settings.dtype)
    rtol, atol = (0.0, 1e-4) if settings.dtype == "float32" else (0.1, 0.3)
    torch.testing.assert_close(whole(input_ids=windows.ids).logits, adapted, rtol=rtol, atol=atol)


def test_norms_with_biases_run_and_merge_on_a_base_of_sixteen_bits(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    settings = ModelSettings(str(tmp_path), dtype="bfloat16", device="cpu")
    model = load_model(settings, LoraSettings(modules_to_save=["norms"]), seed=0)
    moved = {name: tensor + 0.25 * (tensor.ndim == 1) for name, tensor in get_adapter(model).items()}
    assert sum(tensor.ndim == 1 for tensor in moved.values()) == 6  # of two norms in the layer and the last one
    set_adapter(model, moved)
    adapted = model.eval()(input_ids=torch.arange(8)[None]).logits
    base = merged(model)
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(base(input_ids=torch.arange(8)[None]).logits, adapted, rtol=0.05, atol=0.05)


def test_norms_are_those_with_vectors_that_text_passes() -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    olmo = AutoModelForCausalLM.from_config(OlmoConfig(**tiny, num_attention_heads=2, pad_token_id=0))
    with pytest.raises(ValueError, match=r"=\[norms\]: the norms of this model have no vectors to train"):
        modules_to_save(olmo, ["norms"])
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**tiny, **heads, use_qk_norm=True, pad_token_id=0))
    assert modules_to_save(cohere, ["norms"]) == ["model.layers.0.input_layernorm", "model.norm"]  # q_norm is a matrix
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    gemma = AutoModelForImageTextToText.from_config(
        Gemma3Config(text_config={**tiny, **heads}, vision_config={**vision, "image_size": 28, "patch_size": 14})
    )
    text = {name for name, _ in gemma.named_modules() if name.startswith("model.language_model.")}
    for wanted in ("norms", "norm"):
        found = modules_to_save(gemma, [wanted])
        taken = {name for name, _ in gemma.named_modules() if name.endswith(tuple(found))}
        assert taken and taken <= text


def test_vectors_do_not_decay() -> None:
    model = load_model(ModelSettings(device="cpu"), LoraSettings(modules_to_save=["norms"]), seed=0)
    windows = Windows.whole(torch.randint(5, 200, (4, 16), generator=torch.Generator().manual_seed(0)))
    adapter = get_adapter(model)
    training = TrainSettings(update="delta", lr=1e-3, steps=1, batch_size=2, micro_batch_size=2)
    plain, decayed = (
        finetune(model, adapter, windows, replace(training, weight_decay=decay), seed=0)[0] for decay in (0.0, 0.5)
    )
    for name in adapter:
        same = ".lora_A." not in name  # B is zero, which stays so; norms are scales and do not decay
        assert torch.equal(plain[name], decayed[name]) == same


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("lm_head", r"'lm_head' holds [\d,]+ values of matrices: modules of vectors alone, such as \[norms\]"),
        ("mlp", r"'model\.layers\.0\.mlp' holds [\d,]+ values of matrices"),
        ("nrom", r"'nrom' is the end of no module's name, such as 'model\.layers\.0\.input_layernorm'"),
        ("act_fn", r"'model\.layers\.0\.mlp\.act_fn' has nothing to train"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_named(wanted: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"lora\.modules_to_save: {said}"):
        empty_model(ModelSettings(), LoraSettings(modules_to_save=[wanted]))


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_windows_pass_one_by_one_where_hooks_see_no_vectors(kind: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings()
    settings.privacy = replace(settings.privacy, name="record_dp", epsilon=None, noise_multiplier=1.0)
    for lora in (settings.lora, replace(settings.lora, **kind)):
        settings.lora = lora
        guard = Guard(settings, 100, tmp_path / str(lora.dora), 0)
        assert guard.protection(b"secret").one_by_one == (lora != LoraSettings())


@pytest.mark.parametrize("kind", VECTOR_KINDS)
def test_vectors_go_neither_with_b_only_nor_with_a_server_that_does_not_hold_them(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings_for(tmp_path, "run", codec__name="b-only")
    settings.lora = replace(settings.lora, **kind)
    with pytest.raises(ValueError, match=r"lora\.(dora=true|modules_to_save=.*) does not go with codec=b-only"):
        check_settings(settings)
    settings.codec.name, settings.server.base = "rotated", "none"
    with pytest.raises(ValueError, match=r"server\.base=none does not go with lora\.(dora|modules_to_save)=.*\.start"):
        check_settings(settings)
    model = load_model(settings.model, settings.lora, seed=0)
    save_adapter(get_adapter(model), model.peft_config["default"], {}, tmp_path / "start")
    settings.lora.start = str(tmp_path / "start")
    check_settings(settings)
    seen = Outline(settings).initial
    assert all(torch.equal(tensor, seen[name]) for name, tensor in get_adapter(model).items())
