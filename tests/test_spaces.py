"""Where gradients will lie, read off a base model's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import spaces
from adapters.finetune import finetune
from adapters.model import adapter_parts, adapter_shapes, empty_model, get_adapter, load_model, on_host
from adapters.settings import LoraSettings, ModelSettings, TrainSettings
from adapters.spaces import Wanted, spaces_of
from adapters.windows import Windows
from conf.basis import priors_of
from gradcodec.layout import Layout

TINY = Path("assets/tiny-llama").absolute()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CG_FEDLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def layout_of(settings: ModelSettings, lora: LoraSettings | None = None) -> Layout:
    model = empty_model(settings, lora or LoraSettings())
    return Layout.of(adapter_shapes(model), adapter_parts(model))


def normed(gram: torch.Tensor) -> torch.Tensor:
    return gram / gram.trace()


def test_directions_are_those_of_what_writes_and_reads() -> None:
    weights = {name: tensor.double() for name, tensor in load_file(TINY / "model.safetensors").items()}
    settings = ModelSettings(path=str(TINY))
    priors = priors_of(settings, layout_of(settings))
    assert set(priors) == {block.name for block in layout_of(settings).blocks}

    def weight(which: str, layer: int = 1) -> torch.Tensor:
        part = "self_attn" if which in "qkvo" else "mlp"
        return weights[f"model.layers.{layer}.{part}.{which}_proj.weight"]

    embedding = weights["model.embed_tokens.weight"]
    written = normed(embedding.T @ embedding)
    for which in ("o", "down"):
        written = written + normed(weight(which, 0) @ weight(which, 0).T)
    gain = weights["model.layers.1.input_layernorm.weight"]
    reads = normed(sum((normed(weight(w).T @ weight(w)) for w in "qkv"), torch.zeros(192, 192).double()))
    grams = {
        "q_proj.lora_A": reads + normed(gain[:, None] * normed(written) * gain),
        "v_proj.lora_A": reads + normed(gain[:, None] * normed(written) * gain),
        "q_proj.lora_B": normed(weight("q") @ weight("q").T) + normed(weight("k") @ weight("k").T),
        "v_proj.lora_B": normed(weight("v") @ weight("v").T) + normed(weight("o").T @ weight("o")),
        "o_proj.lora_A": normed(weight("o").T @ weight("o")) + normed(weight("v") @ weight("v").T),
    }
    for end, gram in grams.items():
        prior = priors[f"base_model.model.model.layers.1.self_attn.{end}.weight"]
        energies = torch.linalg.eigvalsh(normed(gram)).flip(0)[: spaces.NUM_DIRECTIONS]
        directions = prior.directions_WK.double()
        assert torch.allclose(prior.shares_K.double(), energies, atol=1e-6)
        assert torch.allclose(directions.T @ normed(gram) @ directions, energies.diag(), atol=1e-6)


def test_gradients_lie_there(tmp_path: Path) -> None:
    """More of an update's energy lies in the first quarter of the directions than in a quarter of any others."""
    settings = ModelSettings(path=str(TINY))
    model = load_model(settings, LoraSettings(target_modules=["all-linear"]), seed=0)
    text = Windows.whole(torch.randint(1, 1024, (8, 32), generator=torch.Generator().manual_seed(0)))
    train = TrainSettings(update="gradient", lr=1.0, steps=1, batch_size=8, micro_batch_size=8)
    update = on_host(finetune(model, get_adapter(model), text, train, seed=1)[0])
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    blocks_RC, priors = layout.to_blocks(update), priors_of(settings, layout)
    inside = []
    for block in layout.blocks:
        rows_RW = blocks_RC[: block.rank, block.start : block.stop]
        if block.transposed and bool(rows_RW.any()):
            quarter = priors[block.name].directions_WK[:, : block.width // 4]
            inside.append(float((rows_RW @ quarter).square().sum() / rows_RW.square().sum()))
    assert len(inside) == 4 * 7
    assert sum(inside) / len(inside) > 0.4


def test_they_are_computed_once_and_anew_for_another_checkpoint(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    settings = ModelSettings(path=str(tmp_path / "model"))
    layout = layout_of(settings)
    first = priors_of(settings, layout)
    with monkeypatch.context() as patch:
        patch.setattr(spaces, "_computed", lambda *_: pytest.fail("it lies in the cache"))
        again = priors_of(settings, layout)
    assert all(torch.equal(first[name].directions_WK, again[name].directions_WK) for name in first)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"] *= 2
    tensors["model.layers.0.self_attn.o_proj.weight"][:, :32] *= 3
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    other = priors_of(settings, layout)
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
    assert not torch.allclose(first[name].shares_K, other[name].shares_K)
    assert len([*(cache / "spaces").glob("*.safetensors")]) == 2


def test_a_damaged_cache_and_one_that_takes_nothing_cost_time_alone(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(path=str(TINY))
    layout = layout_of(settings)
    first = priors_of(settings, layout)
    (kept,) = (cache / "spaces").glob("*.safetensors")
    whole = kept.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-5] + b"\x3f" + whole[-4:], whole.replace(b'"names"', b'"manes"')):
        assert damaged != whole
        kept.write_bytes(damaged)
        again = priors_of(settings, layout)
        assert all(torch.equal(first[name].directions_WK, again[name].directions_WK) for name in first)
        assert kept.read_bytes() != damaged
    (tmp_path / "file").touch()
    monkeypatch.setenv("CG_FEDLLM_CACHE", str(tmp_path / "file"))
    again = priors_of(settings, layout)
    assert all(torch.equal(first[name].directions_WK, again[name].directions_WK) for name in first)


def test_query_heads_are_folded_onto_the_heads_that_they_share(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    settings = ModelSettings(path=str(tmp_path / "model"))
    priors = priors_of(settings, layout_of(settings))
    place = "model.layers.0.self_attn.{}_proj"
    q, k = (model.get_submodule(place.format(which)).weight.detach().double() for which in "qk")
    heads = q.view(4, 16, 64)
    side_by_side = torch.cat([torch.cat([heads[0], heads[1]], 1), torch.cat([heads[2], heads[3]], 1)])
    gram = normed(normed(k @ k.T) + normed(side_by_side @ side_by_side.T))
    found = priors[f"base_model.model.{place.format('k')}.lora_B.weight"]
    assert torch.allclose(found.shares_K.double(), torch.linalg.eigvalsh(gram).flip(0), atol=1e-6)
    assert found.directions_WK.shape == (32, 32)


def test_wide_tensors_are_found_by_iteration_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelSettings(path=str(TINY))
    wanted = [Wanted(b.name, b.tensor, b.rows) for b in layout_of(settings).blocks]
    exact = spaces_of(settings, wanted)
    monkeypatch.setattr(spaces, "_VERSION", 2)
    monkeypatch.setattr(spaces, "_EXACT_WIDTH", 100)
    monkeypatch.setattr(spaces, "NUM_DIRECTIONS", 32)
    for name, space in spaces_of(settings, wanted).items():
        assert torch.allclose(space.shares_K[:16], exact[name].shares_K[:16], rtol=0.02)
    monkeypatch.setattr(spaces, "_VERSION", 3)
    monkeypatch.setattr(spaces, "MAX_WIDTH", 100)
    assert spaces_of(settings, wanted) == {}


def test_a_checkpoint_without_such_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    settings = ModelSettings(path=str(tmp_path / "model"))
    layout = layout_of(settings)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.2\.self_attn\.k_proj\.weight: codec\.basis=model"):
        priors_of(settings, layout)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\*\.safetensors"):
        priors_of(settings, layout)
