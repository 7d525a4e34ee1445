"""Layers that stay on the node: trained there, never sent, each partition's its own, and joined by its owner alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, RunProgram, apply_changes
from flwr.app import Message
from peft import PeftModel
from safetensors.torch import load_file
from test_federation import run, settings_for
from transformers import AutoModelForCausalLM

import client.personal
from adapters.finetune import DivergedError, trained_parameters
from adapters.model import (
    adapter_shapes,
    empty_model,
    freeze_local,
    get_adapter,
    get_local,
    load_model,
    set_adapter,
    set_local,
    whole_shapes,
)
from adapters.settings import LoraSettings
from client.local import load_local, local_file, save_local
from conf.checks import check_settings
from conf.schema import Settings
from server.records.results import RunResults
from strategies.wire import ARRAYS, unwrap_adapter

LOCAL = r"layers\.1\..*"
"""The last of the embedded model's two layers."""


def local_run(folder: Path, name: str, **changes: Any) -> Settings:
    settings = settings_for(folder, name, **({"arm": "dense"} | changes))
    settings.lora.local = [LOCAL]
    settings.federation.clients_per_round, settings.federation.sample_answers = 3, 0
    if settings.arm == "coded":
        settings.codec.bits, settings.codec.down_bits = 0.5, 0.5
    return settings


def memory_of(folder: Path, settings: Settings) -> Path:
    return folder / "memory" / settings.run_id


def test_the_model_is_shared_and_local_without_rest() -> None:
    settings = settings_for(Path(), "x")
    lora = LoraSettings(local=[LOCAL])
    model, whole = load_model(settings.model, lora, 0), load_model(settings.model, LoraSettings(), 0)
    shared, local = get_adapter(model), get_local(model)
    assert shared and local and not shared.keys() & local.keys()
    assert all((".layers.1." in name) == (name in local) for name in whole_shapes(model))
    for name, tensor in get_adapter(whole).items():  # the same seed gives the same values, shared or not
        assert torch.equal(tensor, {**shared, **local}[name])
    trained = len(trained_parameters(model))
    freeze_local(model)
    assert len(trained_parameters(model)) == trained - len(local) == len(shared)
    with pytest.raises(ValueError, match="no factors are left to train together"):
        empty_model(settings.model, LoraSettings(local=[r"layers\..*"]))
    with pytest.raises(ValueError, match=r"lora.local: 'lm_head' is the end of no adapted layer"):
        empty_model(settings.model, LoraSettings(local=["lm_head"]))


def test_norms_beside_them_are_shared_and_stay_as_they_are() -> None:
    lora = LoraSettings(local=[LOCAL], modules_to_save=["norms"])
    model = load_model(settings_for(Path(), "x").model, lora, 0)
    shared, local = get_adapter(model), get_local(model)
    assert any(".layers.1." in name and tensor.ndim == 1 for name, tensor in shared.items())
    set_adapter(model, moved := {name: tensor + 1 for name, tensor in shared.items()})
    set_local(model, {name: tensor - 1 for name, tensor in local.items()})
    assert all(torch.equal(tensor, moved[name]) for name, tensor in get_adapter(model).items())
    assert all(torch.equal(tensor, local[name] - 1) for name, tensor in get_local(model).items())


@pytest.mark.parametrize("arm", ["dense", "coded"])
def test_nothing_of_them_is_sent_and_each_partition_has_its_own(tmp_path: Path, arm: str) -> None:
    sent: list[str] = []

    class Watched(InProcessGrid):
        def answer(self, message: Message) -> Message | None:
            reply = super().answer(message)
            if arm == "dense":
                for one in (message, reply):
                    if one is not None and one.has_content() and ARRAYS in one.content.array_records:
                        sent.extend(unwrap_adapter(one.content))
            return reply

    settings = local_run(tmp_path, arm, arm=arm)
    results = run(settings, tmp_path, Watched)
    assert not results.faults and results.heldout_loss[-1] < results.heldout_loss[0]
    shapes = adapter_shapes(empty_model(settings.model, settings.lora))
    assert results.num_parameters == sum(a * b for a, b in shapes.values())
    assert set(sent) <= shapes.keys() and (arm == "coded" or sent)
    assert load_file(Path(settings.output) / "adapter" / "adapter_model.safetensors").keys() == shapes.keys()
    files = [load_file(local_file(memory_of(tmp_path, settings), partition)) for partition in range(3)]
    for name in files[0]:
        assert ".layers.1." in name
        if ".lora_B." in name:
            assert all(float(file[name].abs().max()) > 0 for file in files)
            assert not torch.equal(files[0][name], files[1][name])


def test_one_trainer_of_many_mixes_nobody_s_layers(tmp_path: Path) -> None:
    """Each partition's layers are to the bit those of a run that the others were not in."""

    class OnlyOne(InProcessGrid):
        def answer(self, message: Message) -> Message | None:
            context = self.contexts[message.metadata.dst_node_id]
            others = message.metadata.message_type == "train" and context.node_config["partition-id"] != 1
            return None if others else super().answer(message)

    found = []
    for name, grid in (("all", InProcessGrid), ("one", OnlyOne)):
        settings = local_run(tmp_path / name, name, federation__rounds=1, federation__wait_seconds=1.0)
        settings.run_id = "same"
        settings.federation.min_clients, settings.federation.round_seconds = 1, 2.0 if name == "one" else 600.0
        run(settings, tmp_path / name, grid)
        found.append(load_file(local_file(memory_of(tmp_path / name, settings), 1)))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_asked_again_it_answers_the_same(tmp_path: Path) -> None:
    """A reply of the second round is lost, and the round is tried again: payload and layers are as without that."""

    class Loses(InProcessGrid):
        lost = 0

        def answer(self, message: Message) -> Message | None:
            reply = super().answer(message)
            config = message.content.config_records["config"]
            if config.get("server-round") == 2 and self.lost < 3 and message.metadata.message_type == "train":
                self.lost += 1
                return None
            return reply

    runs: list[tuple[RunResults, dict[str, torch.Tensor]]] = []
    for name, grid in (("undisturbed", InProcessGrid), ("disturbed", Loses)):
        settings = local_run(tmp_path / name, name, arm="coded", federation__rounds=2)
        settings.run_id = "same"
        settings.federation.round_seconds = 1.0 if name == "disturbed" else 600.0
        results = run(settings, tmp_path / name, grid)
        runs.append((results, load_file(local_file(memory_of(tmp_path / name, settings), 0))))
    (plain, layers), (disturbed, other) = runs
    assert len(disturbed.faults) == 3
    assert [uplink.payload_digest for uplink in plain.uplinks] == [
        uplink.payload_digest for uplink in disturbed.uplinks
    ]
    assert all(torch.equal(tensor, other[name]) for name, tensor in layers.items())


def test_a_node_s_own_adapter_loses_what_the_node_says(tmp_path: Path, run_program: RunProgram) -> None:
    settings = local_run(tmp_path, "run", federation__evaluate_every=1, train__steps=6)
    results = run(settings, tmp_path)
    said = {one.partition: one.loss for one in results.node_losses if one.server_round == settings.federation.rounds}
    out = tmp_path / "own"
    asked = ["--adapter", f"{settings.output}/adapter", "--memory", str(tmp_path / "memory"), "--run", settings.run_id]
    status, printed, _ = run_program(client.personal.main, [*asked, "--partition", "2", "--output", str(out)])
    assert status == 0 and "adapter of partition 2" in printed
    from client.trainer import Trainer
    from tasks.windows import heldout_loss

    windows = Trainer(settings).shard(2).heldout
    base = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    whole = heldout_loss(PeftModel.from_pretrained(base, str(out)), windows, 4)
    assert whole == pytest.approx(said[2], abs=1e-5)
    base = AutoModelForCausalLM.from_pretrained(settings.model.path, dtype=torch.float32)
    shared = heldout_loss(PeftModel.from_pretrained(base, f"{settings.output}/adapter"), windows, 4)
    assert whole != pytest.approx(shared, abs=1e-3)
    for number, what in (("7", "holds no layers of partition 7"), ("2", "holds files")):
        status, _, err = run_program(client.personal.main, [*asked, "--partition", number, "--output", str(out)])
        assert status != 0 and what in err
    status, _, err = run_program(
        client.personal.main, ["--adapter", str(out), *asked[2:], "--partition", "2", "--output", str(tmp_path / "new")]
    )
    assert status != 0 and "is whole" in err


def test_layers_that_diverged_are_not_kept(tmp_path: Path) -> None:
    good = {"x.lora_B.weight": torch.ones(4, 2)}
    save_local(tmp_path, 0, good, 1)
    with pytest.raises(DivergedError, match=r"'x\.lora_B\.weight', which stays on this node, is not finite"):
        save_local(tmp_path, 0, {"x.lora_B.weight": torch.full((4, 2), torch.nan)}, 2)
    assert torch.equal(load_local(tmp_path, 0, good, 3)["x.lora_B.weight"], good["x.lora_B.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arm": "centralised"}, "has no nodes to keep them"),
        ({"lora__start": "x"}, "lora.start do not go together"),
        ({"privacy__name": "record_dp"}, "which no noise protects"),
        ({"lora__local": ["("]}, "lora.local: '\\(' is no regular expression"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    settings = local_run(tmp_path, "run")
    apply_changes(settings, changes)
    with pytest.raises(ValueError, match=said):
        check_settings(settings)
