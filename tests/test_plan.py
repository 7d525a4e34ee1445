"""Dry runs: the paper's three settings with its own figures, and what a run would do from its settings alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_settings import composed
from transformers import Qwen3_5Config, Qwen3MoeConfig

from adapters.model import adapter_parts, adapter_shapes, empty_model
from adapters.settings import LoraSettings, ModelSettings
from conf.checks import check_settings
from conf.schema import Settings
from gradcodec.artifact import RECORDED, load_artifact, save_artifact
from gradcodec.build import build_codec
from gradcodec.codec import Codec
from gradcodec.exchange import encode_update
from gradcodec.layout import Layout
from gradcodec.paper.networks import ARCHITECTURES
from gradcodec.paper.resnet import ResnetCodec
from gradcodec.settings import CodecSettings
from server.plan import Plan, plan_of, print_plan
from server.records.account import SHIPPED_DIGEST, CodecCost

SHAPES = {"llama7b_dolly": "llama-7b", "llama7b_ceval": "llama-7b", "qwen7b_mmlu": "qwen2.5-7b"}


def experiment(name: str, *overrides: str) -> Settings:
    settings = composed(f"+experiment={name}", f"model.path=assets/geometries/{SHAPES[name]}", *overrides)
    assert isinstance(settings, Settings)
    return settings


@pytest.mark.parametrize(
    ("name", "rounds", "clients", "sampled", "batch", "micro", "lr", "epochs", "rank"),
    [
        ("llama7b_dolly", 20, 100, 5, 32, 16, 1.5e-4, 1, 8),
        ("llama7b_ceval", 5, 3, 3, 24, 8, 2.0e-4, 3, 16),
        ("qwen7b_mmlu", 8, 3, 3, 8, 4, 3.5e-4, 2, 8),
    ],
)
def test_experiments_have_the_papers_figures(
    name: str, rounds: int, clients: int, sampled: int, batch: int, micro: int, lr: float, epochs: int, rank: int
) -> None:
    """Section 4.1 and its table."""
    settings = experiment(name)
    federation, training = settings.federation, settings.train
    assert (federation.rounds, federation.num_clients, federation.clients_per_round) == (rounds, clients, sampled)
    assert (training.batch_size, training.micro_batch_size, training.lr) == (batch, micro, lr)
    assert (training.epochs, training.update, settings.lora.rank) == (epochs, "delta", rank)
    assert plan_of(settings).client_memory.total < 24 * 2**30


def test_llama_7b_takes_the_papers_bytes() -> None:
    """[1, 4096, 2048] values, and at half a bit each its 524,288 bytes a client and round."""
    plan = plan_of(experiment("llama7b_dolly"))
    assert plan.layout.num_parameters == 4096 * 2048
    assert plan.payload_bytes == 524_288
    assert plan.uplinks == 100
    assert (plan.num_records, plan.records_here) == (15_011, False)
    assert plan.steps == 3  # 150 records, a tenth held out, 70 % of the rest: 95 windows in batches of 32


def test_records_that_are_here_are_counted() -> None:
    plan = plan_of(composed("task=stdlib"))
    assert plan.records_here
    assert plan.steps == plan.settings.train.steps


def written(path: Path, num_records: int) -> str:
    path.write_text("\n".join([json.dumps({"instruction": "a", "response": "b", "category": "c"})] * num_records))
    return f"task.path={path}"


def test_a_number_of_records_is_assumed_only_where_the_data_are_not_here(tmp_path: Path) -> None:
    for path in ("databricks/databricks-dolly-15k", str(tmp_path / "nowhere.jsonl")):
        plan = plan_of(composed("task=dolly", f"task.path={path}"))
        assert (plan.num_records, plan.records_here) == (15_011, False)
    plan = plan_of(composed("task=dolly", written(tmp_path / "some.jsonl", 30), "task.alpha=100"))
    assert (plan.num_records, plan.records_here) == (30, True)
    with pytest.raises(ValueError, match="'colour' is no column of"):
        plan_of(composed("task=dolly", written(tmp_path / "some.jsonl", 30), "task.partition_by=colour"))
    with pytest.raises(ValueError, match="holds 3 records for 10 clients"):
        plan_of(composed("task=dolly", written(tmp_path / "few.jsonl", 3)))


def test_a_dry_run_downloads_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("a download"))
    assert plan_of(composed("task=alpaca")).num_records == 52_002


@pytest.mark.parametrize("name", ["identity", "bf16", "int8", "nf4", "sign", *ARCHITECTURES])
def test_a_codec_of_one_rate_takes_what_is_planned(name: str) -> None:
    model = empty_model(ModelSettings(), LoraSettings())
    layout = Layout.of(adapter_shapes(model), adapter_parts(model))
    codec: Codec
    if name in ARCHITECTURES:
        codec = ResnetCodec(layout, ARCHITECTURES[name](False), False, b"test")
    else:
        codec = build_codec(CodecSettings(name), layout)
    payload, _ = encode_update({key: torch.randn(shape) for key, shape in layout.shapes.items()}, None, codec=codec)
    plan = plan_of(composed("task=alpaca", f"codec.name={name}", "codec.artifact=somewhere"))
    assert plan.payload_bytes == len(payload)


def test_what_ships_with_the_project_costs_nothing_and_ones_own_its_copies_and_its_recording(tmp_path: Path) -> None:
    shipped = load_artifact(Path("gradcodec/general"), "learned")
    assert shipped.digest == SHIPPED_DIGEST, "the general artifact is another one now"
    assert CodecCost.of("gradcodec/general") == CodecCost.of(None) == CodecCost.of(str(tmp_path)) == CodecCost()
    own = replace(shipped, tensors={**shipped.tensors, "any_rows": shipped.tensors["any_rows"] + 1})
    for trained, recorded in (({RECORDED: 1000}, 1000), ({}, 0), ({RECORDED: "many"}, 0)):
        save_artifact(replace(own, settings={"codec": {}, "trained": trained}), tmp_path / "own")
        size = sum(path.stat().st_size for path in (tmp_path / "own").iterdir())
        assert CodecCost.of(str(tmp_path / "own")) == CodecCost(size, recorded)
    plan = plan_of(composed("codec.down_bits=0.5", f"codec.artifact={tmp_path / 'own'}"))
    account, clients = plan.account(), plan.settings.federation.num_clients
    assert account is not None
    assert account.artifact == clients * size
    start = tmp_path / "start"
    start.mkdir()
    further = replace(plan, settings=replace(plan.settings, lora=replace(plan.settings.lora, start=str(start))))
    again = further.account()
    assert again is not None
    assert again.total == account.total + clients * plan.dense_bytes, "every client is sent the start adapter once"


def test_clients_who_rarely_come_are_planned_a_key() -> None:
    """With a hundred clients what each has missed would otherwise be most of all bytes."""
    often = plan_of(composed("codec.down_bits=0.5", "task.heldout_windows=2", "federation.rounds=20"))
    rarely = replace(
        often,
        settings=replace(often.settings, federation=replace(often.settings.federation, num_clients=100)),
    )
    assert often.step_bytes is not None
    few, many = often.account(), rarely.account()
    assert few is not None
    assert many is not None
    assert few.snapshots == 10 * bytes_of_axes(often)
    key_and_step = math.ceil(2.0 * often.layout.num_parameters / 8) + often.step_bytes
    assert many.delivery <= 100 * (key_and_step + bytes_of_axes(often))
    assert many.delivery >= 95 * key_and_step
    assert many.snapshots > 50 * key_and_step


def bytes_of_axes(plan: Plan) -> int:
    return len(plan.layout.blocks) * plan.layout.rank**2


def test_what_an_update_decides_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(composed("task=alpaca", "codec.name=rotated", "codec.bits=null"))
    assert plan.payload_bytes is None
    print_plan(plan)
    assert "codec.bits=null" in capsys.readouterr().out


def test_what_an_adapter_does_not_reach_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    Qwen3MoeConfig(**sizes, **experts, vocab_size=64).save_pretrained(tmp_path / "experts")
    whole = Qwen3_5Config(text_config={**sizes, "vocab_size": 64}, architectures=["Qwen3_5ForConditionalGeneration"])
    whole.save_pretrained(tmp_path / "whole")
    for name, said in (("experts", "leaves out the experts"), ("whole", "vLLM does not apply")):
        plan = plan_of(composed(f"model.path={tmp_path / name}", "lora.target_modules=[all-linear]", "task=alpaca"))
        (warning,) = plan.warnings
        assert said in warning
        print_plan(plan)
        assert warning in " ".join(capsys.readouterr().out.split())
    assert plan_of(composed(f"model.path={tmp_path / 'experts'}", "task=alpaca")).warnings == ()


def test_simulated_clients_have_a_gpu_or_the_run_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run needs none (the tests above)."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in SHAPES:
        settings = experiment(name)
        assert settings.backend.client_gpus == 1
        with pytest.raises(ValueError, match=r"backend\.client_gpus=1 is more than the 0 GPUs of this machine"):
            check_settings(settings)
        check_settings(experiment(name, "backend.client_gpus=0"))
        check_settings(experiment(name, "backend=superlink"))
        check_settings(experiment(name, "arm=centralised"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_settings(experiment("llama7b_dolly"))


def test_a_dry_run_says_what_a_dense_arm_sends(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan(plan_of(experiment("llama7b_dolly", "arm=dense")))
    said = capsys.readouterr().out
    assert "8,388,608 parameters in 256 tensors" in said
    assert "none (arm=dense): float32" in said
