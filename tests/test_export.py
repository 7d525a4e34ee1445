"""Adapters out and in again: what a run writes is what others load, and what does not fit is named before training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_federation import run, settings_for
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adapters.export import CARD, load_adapter, load_start, public_name, save_adapter
from adapters.files import CONFIG, WEIGHTS
from adapters.model import get_adapter, load_model, on_host, set_adapter
from adapters.settings import LoraSettings, ModelSettings
from adapters.windows import Windows
from server.export import export
from server.records.results import RunResults
from server.records.trained import read_trained
from server.run.evaluate import Evaluator
from tasks.windows import heldout_loss

BASE = Path("assets/tiny-llama")
MERGED_BF16 = 0.01  # nats per token: what rounding the merged weights to bfloat16 may change


ROTATED: dict[str, object] = {"codec__name": "rotated", "codec__bits": 1.0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    folder = tmp_path_factory.mktemp("finished")
    return run(settings_for(folder, "run", **ROTATED), folder)


@pytest.fixture(scope="module")
def heldout(finished: RunResults) -> Windows:
    return Evaluator(finished.settings).heldout


@pytest.fixture
def adapter(finished: RunResults, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(Path(finished.settings.output) / "adapter", tmp_path / "adapter"))


def test_peft_loads_the_adapter_and_gives_the_runs_loss(finished: RunResults, heldout: Windows) -> None:
    assert finished.heldout_loss[-1] < finished.heldout_loss[0] - 0.02
    folder = Path(finished.settings.output) / "adapter"
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert heldout_loss(PeftModel.from_pretrained(base, str(folder)), heldout) == pytest.approx(
        finished.heldout_loss[-1], abs=1e-5
    )
    by_name = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    assert heldout_loss(by_name, heldout) == pytest.approx(finished.heldout_loss[-1], abs=1e-5)


def test_the_adapter_is_what_vllm_asks_for(finished: RunResults) -> None:
    folder = Path(finished.settings.output) / "adapter"
    config = json.loads((folder / CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 8, 16.0, "none")
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert not any(config[key] for key in ("modules_to_save", "use_dora", "use_rslora"))
    assert config["base_model_name_or_path"] == "assets/tiny-llama"
    names = load_file(folder / WEIGHTS).keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def test_the_card_tells_the_run_and_no_path_of_its_host(finished: RunResults) -> None:
    card = ModelCard.load(Path(finished.settings.output) / "adapter" / CARD)
    assert card.data.library_name == "peft"
    for fact in (
        finished.settings.run_id,
        "| arm | coded |",
        "| rounds | 3, 2 of 3 clients drawn for each |",
        f"| bytes up per client and round | {finished.payload_bytes_per_client_round:,.0f} |",
        f"| bits up per parameter | {finished.bits_per_parameter:.3f} |",
        f"{finished.heldout_loss[0]:.4f} -> {finished.heldout_loss[-1]:.4f}",
        "PeftModel.from_pretrained",
    ):
        assert fact in card.content
    assert str(Path.home()) not in card.content
    assert str(Path(finished.settings.output).parent) not in card.content


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", MERGED_BF16)])
def test_the_merged_model_is_the_run_without_peft(
    finished: RunResults, heldout: Windows, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    export(finished.settings.output, tmp_path / "merged", merged=True, overrides=[f"model.dtype={dtype}"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert heldout_loss(model, heldout) == pytest.approx(finished.heldout_loss[-1], abs=tolerance)
    text = "def merged(self):\n    return 你好"
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(BASE)(text)["input_ids"]
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "merged").iterdir()} == {mode_of_new_files(tmp_path)}


def mode_of_new_files(folder: Path) -> int:
    (folder / "new").touch()
    return (folder / "new").stat().st_mode & 0o777


def test_a_runs_adapter_and_its_export_can_be_read_by_others_with_their_tokenizer(
    finished: RunResults, tmp_path: Path
) -> None:
    export(finished.settings.output, tmp_path / "out", merged=False, overrides=[])
    ids = AutoTokenizer.from_pretrained(BASE)("import os; 你好")["input_ids"]
    for folder in (Path(finished.settings.output) / "adapter", tmp_path / "out"):
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode_of_new_files(tmp_path)}
        assert AutoTokenizer.from_pretrained(folder)("import os; 你好")["input_ids"] == ids


def test_a_base_that_cannot_be_reached_is_said_and_the_adapter_written(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    export(str(adapter), tmp_path / "out", merged=False, overrides=["model.path=nobody/no-such-model"])
    assert "no tokenizer is written beside the adapter" in capsys.readouterr().err
    assert load_adapter(tmp_path / "out")


def test_another_runs_folder_may_not_say_that_code_is_run(finished: RunResults, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.settings.output, tmp_path / "run")
    content = json.loads((copy / "results.json").read_text())
    content["settings"]["model"]["trust_remote_code"] = True
    (copy / "results.json").write_text(json.dumps(content))
    assert not read_trained(str(copy)).settings.model.trust_remote_code
    assert read_trained(str(copy), ["model.trust_remote_code=true"]).settings.model.trust_remote_code


def test_a_card_shows_foreign_text_as_text(adapter: Path, tmp_path: Path) -> None:
    config, tensors = load_adapter(adapter)
    config.base_model_name_or_path = 'x"`; rm -rf ~\n# <script>alert(1)</script> \x1b]0;owned\x07'
    save_adapter(tensors, config, {"task": "a | b\n\n![x](http://y) <b>"}, tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert "<script>" not in card.partition("```python")[0] and "<b>" not in card
    assert "\x1b" not in card and "\n# <" not in card
    assert r"| task | a \| b \!\[x\](http://y) &lt;b> |" in card


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "regex": {"target_modules": ".*_proj"},
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "drawn": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "alora": {"alora_invocation_tokens": [5, 6]},
    "dora": {"use_dora": True},
    "rsdora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 4}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 4}},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.[01]\..*": 4, "q_proj": 2},  # of q_proj in layers 0 and 1 the first counts
        "alpha_pattern": {"self_attn.v_proj": 5.0},
    },
    "layers": {"layers_to_transform": [0, 1]},
    "exclude": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "tokens": {"trainable_token_indices": [3, 4]},
    "saved": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "replicated": {"layer_replication": [(0, 2), (1, 4)]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "fan": {"fan_in_fan_out": True},
}
SERVED = {"plain", "rslora", "gaussian", "orthogonal", "drawn", "fan"}
SERVED |= {"dora", "rsdora", "rank_pattern", "alpha_pattern", "patterns", "exclude", "norms"}
IDS = torch.arange(5, 21)[None]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_of_peft_gives_pefts_logits_or_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    how = {"r": 8, "lora_alpha": 24, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **KINDS[kind]}
    made = get_peft_model(base, LoraConfig(**how))
    for name, parameter in made.named_parameters():
        if ".lora_B." in name:
            parameter += 0.1 * torch.randn_like(parameter)
        if ".lora_magnitude_vector." in name or ".modules_to_save." in name:
            parameter *= 1 + 0.1 * torch.randn_like(parameter)
    made.save_pretrained(str(tmp_path / "made"))
    if kind not in SERVED:
        with pytest.raises(ValueError, match=r"is no plain LoRA adapter: .* is not served|is no linear layer"):
            read_trained(str(tmp_path / "made")).load_model()
        return
    again = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(again, str(tmp_path / "made")).eval()(input_ids=IDS).logits
    there = ["model.device=cpu"]  # where the logits of transformers and PEFT alone are computed
    adapter = read_trained(str(tmp_path / "made"), there)
    assert float((adapter.load_model().eval()(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
    started = load_start(tmp_path / "made", fresh := load_model(adapter.settings.model, adapter.settings.lora, seed=1))
    set_adapter(fresh, started)
    assert float((fresh.eval()(input_ids=IDS).logits - wanted).abs().max()) < 1e-5
    export(str(tmp_path / "made"), tmp_path / "merged", merged=True, overrides=there)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    rounding = 1e-5 * float(wanted.abs().max())  # of the sum of weights, which PEFT does not form
    assert float((merged(input_ids=IDS).logits - wanted).abs().max()) < rounding


def test_an_adapter_of_a_quantised_base_is_merged_into_the_unquantised_one(adapter: Path, tmp_path: Path) -> None:
    trained = ["model.quantization=int8", "model.gradient_checkpointing=true"]
    with pytest.raises(ValueError, match=r"give --set model\.quantization=none"):
        export(str(adapter), tmp_path / "merged", merged=True, overrides=trained)
    export(str(adapter), tmp_path / "merged", merged=True, overrides=[*trained, "model.quantization=none"])
    exported, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "merged", BASE))
    assert exported.get("use_cache") == original.get("use_cache")


def test_an_exported_adapter_is_the_same_under_another_base_name(
    finished: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it would be asked for a minute
    export(finished.settings.output, tmp_path / "out", merged=False, overrides=["model.path=someone/tiny-llama"])
    config, tensors = load_adapter(tmp_path / "out")
    assert config.base_model_name_or_path == "someone/tiny-llama"
    assert "base_model: someone/tiny-llama" in (tmp_path / "out" / CARD).read_text()
    original = load_file(Path(finished.settings.output) / "adapter" / WEIGHTS)
    assert tensors.keys() == original.keys() and all(torch.equal(tensors[name], original[name]) for name in original)
    assert f"| run | {finished.settings.run_id} |" in (tmp_path / "out" / CARD).read_text()
    with pytest.raises(ValueError, match="holds files already"):
        export(finished.settings.output, tmp_path / "out", merged=False, overrides=[])


def test_an_adapter_alone_stands_on_its_own_base_model(adapter: Path) -> None:
    trained = read_trained(str(adapter))
    assert (trained.name, trained.results, trained.settings.model.path) == ("adapter", None, "assets/tiny-llama")
    loaded = on_host(get_adapter(trained.load_model()))
    assert all(torch.equal(tensor, trained.adapter[name]) for name, tensor in loaded.items())


def test_a_run_goes_on_from_an_adapter(finished: RunResults, tmp_path: Path) -> None:
    start = Path(finished.settings.output) / "adapter"
    results = run(settings_for(tmp_path, "run", lora__start=str(start), **ROTATED), tmp_path)
    assert results.heldout_loss[0] == pytest.approx(finished.heldout_loss[-1], abs=1e-5)
    assert results.heldout_loss[-1] < results.heldout_loss[0]
    assert all(uplink.payload_bytes > 0 for uplink in results.uplinks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora__rank": 4}, r"has another rank than this run: give lora\.rank=8"),
        ({"lora__alpha": 32.0}, r"has another alpha than this run: give lora\.alpha=16"),
        ({"lora__rslora": True}, r"has another rslora than this run: give lora\.rslora=false"),
        ({"lora__dora": True}, r"has another dora than this run: give lora\.dora=false"),
        ({"lora__alpha_pattern": {"q_proj": 4.0}}, r"has another alpha_pattern .* give lora\.alpha_pattern='\{\}'"),
        ({"lora__target_modules": ["q_proj"]}, r"give lora\.target_modules=\[k_proj,o_proj,q_proj,v_proj\]"),
    ],
)
def test_a_start_of_another_shape_is_refused_before_any_round(
    adapter: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        run(settings_for(tmp_path, "run", arm="dense", lora__start=str(adapter), **change), tmp_path)
    assert "round_started" not in (tmp_path / "run" / "events.jsonl").read_text()


def test_a_start_of_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    model = load_model(ModelSettings(), LoraSettings(), seed=0)
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "Qwen/Qwen2.5-1.5B"}))
    with pytest.raises(ValueError, match=r"base model 'Qwen/Qwen2\.5-1\.5B', this run is on 'assets/tiny-llama'"):
        load_start(adapter, model)
    wider = LlamaConfig(vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    other = get_peft_model(LlamaForCausalLM(wider), LoraConfig(r=8, lora_alpha=16.0, target_modules=targets))
    save_adapter(get_adapter(other), model.peft_config["default"], {}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"the model wants .* another lora\.rank or base model"):
        load_start(tmp_path / "other", model)


def test_damaged_and_missing_files_are_named(adapter: Path, tmp_path: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    for part in (whole[: len(whole) // 2], whole[:6], b""):
        (adapter / WEIGHTS).write_bytes(part)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            load_adapter(adapter)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(adapter)
    (adapter / WEIGHTS).write_bytes(whole)
    (adapter / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        load_adapter(adapter)
    with pytest.raises(ValueError, match="nowhere is no directory"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a_field_of_tomorrow": {"depth": 2}}, "'a_field_of_tomorrow', which peft .* does not know"),
        ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config="),
        ({"bias": "all"}, "bias=all"),
        ({"target_modules": ".*_proj"}, "target_modules='"),
        ({"peft_type": "IA3"}, "peft_type=.*IA3|cannot be read"),
    ],
)
def test_what_is_no_plain_lora_is_refused(adapter: Path, change: dict[str, object], said: str) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        load_adapter(adapter)


def test_a_tensor_too_many_is_refused(adapter: Path) -> None:
    save_file({**load_file(adapter / WEIGHTS), "more": torch.zeros(1)}, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=r"the adapter and the model differ in tensor 'more'"):
        load_start(adapter, load_model(ModelSettings(), LoraSettings(), seed=0))


def test_dora_without_its_magnitudes_is_refused(adapter: Path) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match=r"the adapter and the model differ in tensor .*lora_magnitude_vector"):
        read_trained(str(adapter)).load_model()


def test_results_of_another_program_are_named(finished: RunResults, tmp_path: Path) -> None:
    copy = shutil.copytree(finished.settings.output, tmp_path / "run")
    (copy / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json is not what a run writes"):
        read_trained(str(copy))


def test_a_base_models_public_name_is_its_name_on_the_hub() -> None:
    cached = "/data/hub/models--Qwen--Qwen2.5-1.5B/snapshots/0123abc"
    assert public_name(cached) == "Qwen/Qwen2.5-1.5B"
    assert public_name("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    assert public_name(str(BASE.absolute())) == "assets/tiny-llama"
    assert public_name("/models/llama") == "/models/llama"


def test_exports_and_scores_answer_help_and_wrong_arguments_without_an_engine() -> None:
    slow = "{'torch', 'transformers', 'peft', 'datasets', 'lm_eval', 'flwr'}"
    program = f"import sys, server.export, server.score; print({slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
