"""Real architectures, tiny and with random weights: loaded, adapted, cut into blocks, coded, federated."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from adapters.architectures import left_out
from adapters.base import check_vocabulary, load_config, load_tokenizer, resolve_device
from adapters.export import served_by_vllm
from adapters.finetune import finetune
from adapters.model import adapter_parts, adapter_shapes, empty_model, get_adapter, load_model, on_host, set_adapter
from adapters.settings import LoraSettings, ModelSettings, TrainSettings, check_model, is_hub_name
from adapters.windows import Windows
from client.app import app as client_app
from client.trainer import Trainer
from conf.basis import priors_of
from conf.schema import FederationSettings, Settings
from gradcodec.build import build_codec
from gradcodec.exchange import decode_update, encode_update
from gradcodec.fidelity import fidelity
from gradcodec.layout import Layout
from gradcodec.settings import CodecSettings
from server.run.federation import run_federation
from tasks.settings import TaskSettings
from tasks.windows import heldout_loss

TINY = Path("assets/tiny-llama").absolute()
VOCABULARY = 1040
"""That of the embedded tokenizer, 1,024, and room for the tokens that Qwen's classes of tokenizers add."""
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED, **TOKENS),
    "qwen2": lambda: Qwen2Config(**GROUPED, **TOKENS),
    "qwen3": lambda: Qwen3Config(**GROUPED, **TOKENS, head_dim=32),
    "mistral": lambda: MistralConfig(**GROUPED, **TOKENS, head_dim=16),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, **TOKENS, intermediate_size=256, max_position_embeddings=128),
    "phi3": lambda: Phi3Config(**GROUPED, **TOKENS),
    "gemma2": lambda: Gemma2Config(**GROUPED, **TOKENS, head_dim=16),
    "gemma3": lambda: Gemma3Config(
        text_config={**GROUPED, "head_dim": 16},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, **TOKENS),
}
SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj"}
ATTENTION = {
    "gpt_neox": {"attention.query_key_value", "attention.dense"},
    "phi3": {"qkv_proj", "o_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj"},
}
TRAINING = TrainSettings(update="gradient", lr=1.0, steps=2, batch_size=2, micro_batch_size=2)


@pytest.fixture(scope="module", params=CONFIGS)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelSettings]:
    """Architecture -> settings of a tiny random model of it on disk, made at the first call."""
    folder = tmp_path_factory.mktemp("models")

    def model_of(name: str) -> ModelSettings:
        if not (folder / name).is_dir():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder / name)
            for file in TINY.glob("tokenizer*"):
                shutil.copy(file, folder / name)
        return ModelSettings(path=str(folder / name))

    return model_of


@pytest.fixture(scope="module")
def windows() -> Windows:
    return Windows.whole(torch.randint(1, 1024, (8, 16), generator=torch.Generator().manual_seed(0)))


def update_of(settings: ModelSettings, windows: Windows, lora: LoraSettings | None = None) -> dict[str, torch.Tensor]:
    model = load_model(settings, lora or LoraSettings(), seed=0)
    return finetune(model, get_adapter(model), windows, TRAINING, seed=1)[0]


def cosine(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return fidelity(*(torch.cat([u[name].flatten() for name in one]) for u in (one, other))).cosine


def test_an_update_of_any_architecture_is_cut_coded_and_decoded(
    architecture: str, models: Callable[[str], ModelSettings], windows: Windows, tmp_path: Path
) -> None:
    model = load_model(models(architecture), LoraSettings(), seed=0)
    found = {tuple(name.split(".lora_")[0].split(".")[-2:]) for name in adapter_shapes(model)}
    assert {end for _, end in found} == {t.rpartition(".")[2] for t in ATTENTION.get(architecture, SEPARATE)}
    assert not any("mlp" in part for part, _ in found)
    update = on_host(finetune(model, get_adapter(model), windows, TRAINING, seed=1)[0])  # this codec works there
    assert all(bool(tensor.any()) for name, tensor in update.items() if ".lora_B." in name)
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    back = layout.to_update(layout.to_blocks(update))
    assert all(torch.equal(back[name], update[name]) for name in update)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CG_FEDLLM_CACHE", str(tmp_path))
        priors = priors_of(models(architecture), layout)
    assert {name: len(prior.directions_WK) for name, prior in priors.items()} == {
        b.name: b.width for b in layout.blocks
    }
    codec = build_codec(CodecSettings("rotated"), layout)
    payload, _ = encode_update(update, None, codec=codec, max_bytes=layout.num_parameters // 4)
    assert cosine(update, decode_update(payload, codec=codec)) > 0.8


def test_an_empty_model_has_the_shapes_of_the_loaded_one(
    architecture: str, models: Callable[[str], ModelSettings]
) -> None:
    for targets in (["attention"], ["all-linear"]):
        lora = LoraSettings(target_modules=targets)
        loaded, empty = load_model(models(architecture), lora, 0), empty_model(models(architecture), lora)
        assert adapter_shapes(empty) == adapter_shapes(loaded)
        assert adapter_parts(empty) == adapter_parts(loaded)


def test_all_linear_is_every_layer_but_the_head(models: Callable[[str], ModelSettings]) -> None:
    shapes = adapter_shapes(load_model(models("llama"), LoraSettings(target_modules=["all-linear"]), 0))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in shapes}
    assert layers == {*SEPARATE, "gate_proj", "up_proj", "down_proj"}


def test_of_several_modalities_the_language_model_alone_is_adapted(models: Callable[[str], ModelSettings]) -> None:
    for targets in (["attention"], ["all-linear"], ["q_proj"]):
        shapes = adapter_shapes(empty_model(models("gemma3"), LoraSettings(target_modules=targets)))
        assert shapes and all(".language_model." in name for name in shapes)


@pytest.mark.parametrize("config", [MixtralConfig, Qwen3MoeConfig])
def test_experts_that_all_linear_leaves_out_are_said(config: Callable[..., PreTrainedConfig]) -> None:
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_local_experts": 4, "num_experts": 4}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**GROUPED, **TOKENS, **experts))
    said = left_out(model, ["all-linear"])
    assert said is not None and "gate_up_proj, down_proj: 4 tensors" in said
    assert left_out(model, ["attention"]) is None


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(
    models: Callable[[str], ModelSettings], tmp_path: Path
) -> None:
    check_vocabulary(models("llama"), load_tokenizer(models("llama")))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**GROUPED, "vocab_size": 1000})).save_pretrained(tmp_path)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    settings = ModelSettings(path=str(tmp_path))
    refused(lambda s: check_vocabulary(s, load_tokenizer(s)), settings, "embedding has 1000 rows")
    refused(lambda s: Trainer(Settings(arm="dense", model=s)).tokenizer, settings, "largest token id is 1023")


def test_names_that_vllm_does_not_apply_are_known() -> None:
    names = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert served_by_vllm(LlamaConfig(architectures=["LlamaForCausalLM"]), names)
    qwen = Qwen3_5Config(architectures=["Qwen3_5ForConditionalGeneration"])
    assert not served_by_vllm(qwen, names)
    assert served_by_vllm(qwen, [names[0].replace("model.layers", "model.language_model.layers")])


def test_attention_of_the_embedded_model_is_what_naming_it_gives() -> None:
    named = load_model(ModelSettings(), LoraSettings(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), 0)
    found = load_model(ModelSettings(), LoraSettings(), 0)
    assert found.peft_config["default"].target_modules == named.peft_config["default"].target_modules
    one, other = get_adapter(named), get_adapter(found)
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["gpt_neox", "phi3", "gpt2"])
def test_parts_of_a_fused_projection_are_what_attention_takes_for_q_k_and_v(
    name: str, models: Callable[[str], ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(models(name), LoraSettings(), 0)
    tensor, parts = next(iter(adapter_parts(model).items()))
    assert list(parts) == ["q", "k", "v"]
    attend: Callable[..., torch.Tensor] = torch.nn.functional.scaled_dot_product_attention
    calls: list[tuple[torch.Tensor, ...]] = []

    def spy(*projections: torch.Tensor, **rest: Any) -> torch.Tensor:
        calls.append(projections)
        return attend(*projections, **rest)

    ids = torch.arange(8, device=model.device)[None]
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for number, runs in enumerate(parts.values()):
        adapter = {name: torch.zeros_like(tensor) for name, tensor in get_adapter(model).items()}
        adapter[tensor.replace("lora_B", "lora_A")] += 1
        set_adapter(model, adapter)
        calls.clear()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        before = calls[0]
        for run in runs:
            adapter[tensor][run.start : run.stop] = 1
        set_adapter(model, adapter)
        calls.clear()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        changed = [not torch.equal(*pair) for pair in zip(before, calls[0], strict=True)]
        assert changed == [i == number for i in range(3)]


def test_one_federated_round(architecture: str, models: Callable[[str], ModelSettings], tmp_path: Path) -> None:
    settings = Settings(output=str(tmp_path / "run"), run_id=f"{tmp_path.name}", model=models(architecture))
    settings.codec.name = "rotated"
    text = json.dumps({"text": "Every client keeps its text, and what it learned from it travels as codes. " * 40})
    (tmp_path / "texts.jsonl").write_text("\n".join([text] * 8))
    settings.task = TaskSettings(name="jsonl", path=str(tmp_path / "texts.jsonl"), window=32, heldout_windows=2)
    settings.train = TRAINING
    settings.federation = FederationSettings(rounds=1, num_clients=2, clients_per_round=2, wait_seconds=5.0)
    results = run_federation(InProcessGrid(client_app, 2, {"memory": str(tmp_path / "memory")}), settings)
    assert len(results.uplinks) == 2
    assert all(8 * uplink.payload_bytes <= 0.5 * results.num_parameters for uplink in results.uplinks)
    assert results.heldout_loss[1] != results.heldout_loss[0]


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True] if torch.cuda.is_available() else [False])
def test_compiled_layers_give_the_same_update_and_loss(
    models: Callable[[str], ModelSettings], windows: Windows, checkpointing: bool
) -> None:
    settings = dataclasses.replace(models("llama"), gradient_checkpointing=checkpointing)
    plain, compiled = (load_model(dataclasses.replace(settings, compile=c), LoraSettings(), 0) for c in (False, True))
    assert adapter_shapes(compiled) == adapter_shapes(plain)
    before = counters["stats"]["unique_graphs"]
    updates = [finetune(model, get_adapter(model), windows, TRAINING, seed=1)[0] for model in (plain, compiled)]
    assert 0 < counters["stats"]["unique_graphs"] - before <= 2  # and not one a layer
    for name, tensor in updates[0].items():
        torch.testing.assert_close(updates[1][name], tensor, rtol=1e-3, atol=1e-6)
    for model in (plain, compiled):
        set_adapter(model, updates[0])
    assert heldout_loss(compiled, windows) == pytest.approx(heldout_loss(plain, windows), abs=1e-5)


def test_compiling_without_a_compiler_is_refused(
    models: Callable[[str], ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"model\.compile=true needs a C\+\+ compiler"):
        load_model(dataclasses.replace(models("llama"), compile=True), LoraSettings(), seed=0)


@pytest.mark.parametrize(("quantization", "least"), [("nf4", 0.7), ("int8", 0.99)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_a_quantised_base_gives_nearly_the_same_update_before_and_after_an_evaluation(
    name: str, models: Callable[[str], ModelSettings], quantization: str, least: float, windows: Windows
) -> None:
    settings = dataclasses.replace(models(name), quantization=quantization)
    model = load_model(settings, LoraSettings(), seed=0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()} == {torch.float32}
    update, _ = finetune(model, get_adapter(model), windows, TRAINING, seed=1)
    heldout_loss(model, windows)
    again, _ = finetune(model, get_adapter(load_model(settings, LoraSettings(), seed=0)), windows, TRAINING, seed=1)
    assert all(torch.equal(update[name], again[name]) for name in update)
    found = cosine(update_of(models(name), windows), update)
    print(f"{name}, {quantization}: cosine to the update of the unquantised base {found:.4f}")  # pytest -rP shows it
    assert found > least


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_checkpointing_changes_no_bit(
    models: Callable[[str], ModelSettings], quantization: str, windows: Windows
) -> None:
    whole = dataclasses.replace(models("llama"), quantization=quantization)
    update = update_of(dataclasses.replace(whole, gradient_checkpointing=True), windows)
    assert all(torch.equal(tensor, update[name]) for name, tensor in update_of(whole, windows).items())


def test_a_hub_name_stays_and_a_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Qwen/Qwen2.5-1.5B")
    (tmp_path / "Qwen" / "Qwen2.5-1.5B").mkdir(parents=True)
    for path in ("Qwen/Qwen2.5-1.5B", "./models/llama", "/models/llama", "assets/geometries/llama-7b", "nowhere"):
        assert not is_hub_name(path)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_tokenizer, load_config, lambda settings: load_model(settings, LoraSettings(), 0)):
        refused(load, ModelSettings(path="nobody/no-such-model"), "hub does not give it")


def refused(load: Callable[[ModelSettings], object], settings: ModelSettings, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(settings)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization": "int3"}, "model.quantization='int3' is none of none, int8, nf4"),
        ({"attention": "flash"}, "model.attention='flash' is none of auto"),
        ({"attention": "flash_attention_2"}, "needs model.dtype=bfloat16 or float16"),
        ({"attention": "flash_attention_2", "dtype": "bfloat16", "device": "cpu"}, "flash-attn and a GPU"),
    ],
)
def test_a_wrong_model_setting_is_named(change: dict[str, str], said: str) -> None:
    refused(check_model, ModelSettings(**change), said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: edit_config(folder, model_type="mamba9"), "does not know this architecture"),
        (lambda folder: edit_config(folder, model_type=None), "does not know this architecture"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "has no weight"),
        (lambda folder: edit_config(folder, hidden_size=32), "has no weight"),
        (lambda folder: edit_config(folder, hidden_size="64"), "'hidden_size' expected int, got str"),
        (lambda folder: edit_config(folder, hidden_size=66), "not a multiple of the number of attention heads"),
        (lambda folder: edit_config(folder, num_attention_heads=0), "ZeroDivisionError"),
        (lambda folder: edit_config(folder, num_key_value_heads=0), "ZeroDivisionError"),
        (lambda folder: edit_config(folder, hidden_act="none"), "config.json"),
        (lambda folder: bring_code(folder), "model.trust_remote_code=true"),
        (lambda folder: cut(folder / "model.safetensors", 2), "model.safetensors"),
        (lambda folder: cut(folder / "model.safetensors", 1000), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in the safetensors format"),
    ],
)
def test_a_broken_model_is_refused_in_one_line(
    damage: Callable[[Path], object], said: str, models: Callable[[str], ModelSettings], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(models("llama").path, folder)
    damage(folder)
    refused(lambda settings: load_model(settings, LoraSettings(), 0), ModelSettings(path=str(folder)), said)


def edit_config(folder: Path, **changes: object) -> None:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def bring_code(folder: Path) -> None:
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(folder, model_type="own", architectures=["OwnModel"], auto_map=code)
    (folder / "own.py").write_text("raise SystemExit('this must not run')")


def cut(file: Path, share: int) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // share])


def test_a_device_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_model(ModelSettings(device="cuda:1"))  # a dry run's may be another machine's
    assert resolve_device(ModelSettings(device="cuda:0")) == torch.device("cuda:0")
    refused(resolve_device, ModelSettings(device="cuda:1"), "model.device='cuda:1': there are 1 GPUs here")
    refused(resolve_device, ModelSettings(device="gpu"), "model.device='gpu' is no device")


def test_a_model_without_a_tokenizer_is_refused(models: Callable[[str], ModelSettings], tmp_path: Path) -> None:
    shutil.copytree(models("llama").path, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(load_tokenizer, ModelSettings(path=str(tmp_path / "mute")), "there is no tokenizer")


def test_weights_that_are_pickled_are_not_read(models: Callable[[str], ModelSettings], tmp_path: Path) -> None:
    shutil.copytree(models("llama").path, tmp_path / "pickled")
    torch.save(load_file(tmp_path / "pickled" / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    settings = ModelSettings(path=str(tmp_path / "pickled"))
    refused(lambda s: load_model(s, LoraSettings(), 0), settings, "no weights in the safetensors format")


def test_quantisation_without_bitsandbytes_is_refused(
    models: Callable[[str], ModelSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    settings = dataclasses.replace(models("llama"), quantization="nf4")
    refused(lambda s: load_model(s, LoraSettings(), 0), settings, "bitsandbytes")


@pytest.mark.parametrize("targets", [["q_prok"], ["q_proj", "k_prok"], ["lm_head"]])
def test_target_modules_that_a_model_lacks_are_named(
    targets: list[str], models: Callable[[str], ModelSettings]
) -> None:
    lora = LoraSettings(target_modules=targets)
    refused(lambda s: load_model(s, lora, 0), models("llama"), f"{targets[-1]!r} is no linear layer of this model")
