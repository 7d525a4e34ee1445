"""The apps' logic on an in-process Grid: the real ClientApp, strategies and round loop, without Flower's engines."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import InProcessGrid, apply_changes
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from google.protobuf.message import DecodeError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adapters.finetune import finetune
from adapters.model import adapter_shapes, load_model
from client.app import app as client_app
from client.trainer import trainer_for
from conf.footprint import client_memory, server_memory
from conf.schema import Settings
from gradcodec.artifact import Artifact, load_artifact, save_artifact
from gradcodec.exchange import encode_update
from gradcodec.layout import Layout
from gradcodec.learned.tables import LearnedTables
from gradcodec.peers.rotated import RotatedCodec
from server.federate import resumed
from server.records.events import read_status
from server.records.results import RunResults
from server.run.centralised import run_alone
from server.run.checkpoint import NAME, load_checkpoint
from server.run.evaluate import Evaluator
from server.run.federation import run_federation
from strategies.errors import FederationError
from strategies.wire import (
    ACCEPTED,
    ADAPTER,
    ADAPTER_TYPE,
    ARRAYS,
    CONFIG,
    METRICS,
    unwrap_adapter,
    wrap_adapter,
    wrap_payload,
)
from tasks.windows import heldout_loss


def settings_for(folder: Path, name: str, **changes: object) -> Settings:
    settings = Settings(output=str(folder / name), run_id=f"{folder.name}-{name}")
    settings.model.path = str(Path("assets/tiny-llama").absolute())
    settings.task.window = 32
    settings.task.heldout_windows = 4
    settings.task.max_windows = 200
    settings.train.update, settings.train.lr = "delta", 0.005
    settings.train.steps, settings.train.batch_size, settings.train.micro_batch_size = 2, 4, 4
    settings.federation.num_clients, settings.federation.clients_per_round = 3, 2
    settings.federation.rounds, settings.federation.wait_seconds = 3, 5.0
    apply_changes(settings, changes)
    return settings


def run(settings: Settings, folder: Path, grid_type: type[InProcessGrid] = InProcessGrid) -> RunResults:
    grid = grid_type(client_app, settings.federation.num_clients, {"memory": str(folder / "memory")})
    return run_federation(grid, settings)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, learned_tables: LearnedTables) -> str:
    folder = tmp_path_factory.mktemp("artifact") / "codec"
    save_artifact(Artifact("learned", learned_tables.to_tensors(), {"codec": {}, "trained": {}}), folder)
    return str(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    folder = tmp_path_factory.mktemp("dense")
    return run(settings_for(folder, "dense", arm="dense", record=str(folder / "updates.safetensors")), folder)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, artifact: str) -> RunResults:
    folder = tmp_path_factory.mktemp("coded")
    return run(settings_for(folder, "coded", arm="coded", codec__artifact=artifact), folder)


def adapter_of(results: RunResults) -> dict[str, torch.Tensor]:
    return load_file(Path(results.settings.output) / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("strategy", "update"), [("fedavg", "delta"), ("fedadam", "gradient"), ("fedtrimmedavg", "delta")]
)
def test_identity_through_the_coded_path_is_the_dense_run_bit_for_bit(
    tmp_path: Path, strategy: str, update: str
) -> None:
    changes: dict[str, object] = {"strategy__name": strategy, "strategy__lr": 0.03, "train__update": update}
    changes["strategy__malicious"] = 0.0  # two clients a round outvote nobody
    dense = run(settings_for(tmp_path, "dense", arm="dense", **changes), tmp_path)
    coded = run(
        settings_for(tmp_path, "identity", arm="coded", codec__name="identity", codec__bits=None, **changes), tmp_path
    )
    assert coded.heldout_loss == dense.heldout_loss
    for name, tensor in adapter_of(dense).items():
        assert torch.equal(adapter_of(coded)[name], tensor)
    assert [u.payload_bytes for u in coded.uplinks] == [16 + 4 * coded.num_parameters] * 6


def test_dense_training_learns(dense: RunResults) -> None:
    assert len(dense.heldout_loss) == 4
    assert dense.heldout_loss[-1] < dense.heldout_loss[0] - 0.05


def test_coded_training_learns_within_its_budget(dense: RunResults, coded: RunResults) -> None:
    assert coded.heldout_loss[0] == dense.heldout_loss[0]
    assert coded.heldout_loss[-1] < coded.heldout_loss[0] - 0.02
    assert [(u.server_round, u.partition) for u in coded.uplinks] == [
        (u.server_round, u.partition) for u in dense.uplinks
    ]
    for uplink in coded.uplinks:
        assert 8 * uplink.payload_bytes <= 0.5 * coded.num_parameters


def test_the_same_seed_gives_the_same_payloads_and_another_does_not(
    tmp_path: Path, coded: RunResults, artifact: str
) -> None:
    again = run(settings_for(tmp_path, "again", codec__artifact=artifact, run_id=coded.settings.run_id), tmp_path)
    assert [u.payload_digest for u in again.uplinks] == [u.payload_digest for u in coded.uplinks]
    assert again.heldout_loss == coded.heldout_loss
    other = run(settings_for(tmp_path, "other", codec__artifact=artifact, seed=1), tmp_path)
    assert not {u.payload_digest for u in other.uplinks} & {u.payload_digest for u in coded.uplinks}


def test_results_and_adapter_are_on_disk_and_true(coded: RunResults) -> None:
    output = Path(coded.settings.output)
    content = json.loads((output / "results.json").read_text())
    assert content["heldout_loss"] == coded.heldout_loss
    assert content["heldout_perplexity"] == [math.exp(loss) for loss in coded.heldout_loss]
    assert content["uplink_payload_bytes"] == sum(u.payload_bytes for u in coded.uplinks)
    assert content["made_with"]["flwr"] == "1.39.0"
    status = read_status(output)
    assert (status.state, status.server_round, status.uplinks, status.nodes) == ("finished", 3, 6, 3)
    assert status.heldout_loss == coded.heldout_loss
    assert status.payload_bytes == content["uplink_payload_bytes"]
    assert status.bytes_down == content["bytes"]["down"] > 6 * 4 * coded.num_parameters
    assert status.seconds_left == 0
    base = AutoModelForCausalLM.from_pretrained("assets/tiny-llama", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(output / "adapter"))
    evaluator = Evaluator(coded.settings)
    assert heldout_loss(loaded, evaluator.heldout) == pytest.approx(coded.heldout_loss[-1], abs=1e-5)


def test_the_recording_holds_every_update(dense: RunResults) -> None:
    assert dense.settings.record is not None
    recorded = load_file(dense.settings.record)
    assert {key.split("/")[0] for key in recorded} == {"r1", "r2", "r3"}
    assert len(recorded) == 6 * 32
    assert all(tensor.abs().max() > 0 for key, tensor in recorded.items() if key.startswith("r3"))


def test_a_nodes_own_file_is_all_its_own(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"{i} " * 300}) for i in range(4)]
    for name in ("server", "node"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = settings_for(tmp_path, "own", arm="dense", task__name="jsonl", task__path=str(tmp_path / "server.jsonl"))
    settings.run_id = "own"
    dealt = trainer_for(settings.to_json(), ())
    own = trainer_for(settings.to_json(), (("task-path", str(tmp_path / "node.jsonl")),))
    assert len(own.shard(1).train) > 2 * len(dealt.shard(1).train)


def test_a_server_cannot_choose_where_a_client_writes(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, "escape", codec__artifact=artifact, run_id="../../escaped")
    with pytest.raises(FederationError, match="is no name for a folder"):
        run(settings, tmp_path)
    assert not list(tmp_path.parent.glob("escaped*"))


class LossyGrid(InProcessGrid):
    """Loses the first reply of partition 0 on its way back."""

    lost = False

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 1000 and not self.lost:
            self.lost = True
            return None
        return reply


def test_a_lost_payload_goes_back_into_the_residual(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(
        tmp_path, "lossy", codec__artifact=artifact, federation__clients_per_round=3, federation__round_seconds=0.5
    )
    grid = LossyGrid(client_app, 3, {"memory": str(tmp_path / "memory")})
    results = run_federation(grid, settings)
    told = {
        (m.metadata.dst_node_id, int(str(m.content.config_records[CONFIG]["server-round"]))): str(
            m.content.config_records[CONFIG][ACCEPTED]
        )
        for m in grid.sent
        if m.metadata.message_type == "train"
    }
    arrived = {(u.server_round, u.partition): u.payload_digest for u in results.uplinks}
    assert len(arrived) == 8
    assert told[1000, 2] == ""  # its first payload never came: the client must send all of it again
    assert told[1007, 2] == arrived[1, 1]
    assert told[1000, 3] == arrived[2, 0]


class HostileGrid(InProcessGrid):
    """Partition 1 answers garbage, another layout's payload, NaN metrics, or nothing that it should."""

    answers: Iterator[Callable[[Message], object]] = iter(
        [
            lambda reply: reply.content.array_records.update({ARRAYS: wrap_payload(b"\xc6\x01 garbage")}),
            lambda reply: reply.content.array_records.update({ARRAYS: ArrayRecord()}),
            lambda reply: reply.content.metric_records.update({METRICS: MetricRecord({"x": 1})}),
        ]
    )

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is not None and message.metadata.message_type == "train" and message.metadata.dst_node_id == 1007:
            next(self.answers)(reply)
        return reply


def test_a_hostile_client_is_left_out_and_the_run_goes_on(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, "hostile", codec__artifact=artifact, federation__clients_per_round=3)
    results = run(settings, tmp_path, HostileGrid)
    assert len(results.heldout_loss) == 4
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.02


class HostileDenseGrid(InProcessGrid):
    """Partition 1 answers with an adapter of other tensors, of halves, of another shape, of NaN, and with none."""

    answers: Iterator[Callable[[Message], ArrayRecord]] = iter(
        [
            lambda reply: wrap_adapter({"other": np.zeros(3, np.float32)}),
            lambda reply: wrap_adapter({n: a.astype(np.float16) for n, a in unwrap_adapter(reply.content).items()}),
            lambda reply: wrap_adapter({n: a.T for n, a in unwrap_adapter(reply.content).items()}),
            lambda reply: wrap_adapter({n: a * np.float32("nan") for n, a in unwrap_adapter(reply.content).items()}),
            lambda reply: ArrayRecord({ADAPTER: Array("uint8", (9,), ADAPTER_TYPE, b"\xff" * 9)}),
            lambda reply: wrap_payload(b"an adapter?"),
        ]
    )

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is not None and message.metadata.message_type == "train" and message.metadata.dst_node_id == 1007:
            reply.content[ARRAYS] = next(self.answers)(reply)
        return reply


def test_a_hostile_dense_client_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "hostile-dense", arm="dense", federation__clients_per_round=3)
    settings.federation.rounds, settings.federation.max_failures = 6, 7
    results = run(settings, tmp_path, HostileDenseGrid)
    said = ["other tensors", "not all float32", "has shape", "holds NaN", "cannot be read", "holds no single"]
    assert all(text in fault.reason for text, fault in zip(said, results.faults, strict=True))
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.05


def test_too_few_nodes_end_the_run_with_their_number(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "few", arm="dense", federation__wait_seconds=0.1)
    with pytest.raises(FederationError, match="2 of 3 nodes came"):
        run_federation(InProcessGrid(client_app, 2), settings)


def test_a_node_without_its_files_is_named_before_training(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, "lacking", codec__artifact=artifact)
    for key, value, said in (
        ("model-path", "/nowhere", "model.path='/nowhere'"),
        ("codec-artifact", "/nowhere", "/nowhere holds no codec artifact"),
    ):
        grid = InProcessGrid(client_app, 3, {key: value})
        with pytest.raises(FederationError) as error:
            run_federation(grid, settings)
        assert said in str(error.value)
        assert all(message.metadata.message_type == "query" for message in grid.sent)


def test_a_model_that_does_not_fit_is_named_before_training(
    tmp_path: Path, artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"codec__artifact": artifact, "codec__basis": "artifact", "seed": 41}  # a model that no test left loaded
    settings = settings_for(tmp_path, "large", **changes)
    needed = server_memory(settings).total
    assert needed < client_memory(settings).total
    monkeypatch.setattr("adapters.footprint.free_bytes", lambda device: needed)
    with pytest.raises(FederationError, match=r"training needs about .* free: try model\.gradient_checkpointing=true"):
        run(settings, tmp_path)
    monkeypatch.setattr("adapters.footprint.free_bytes", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"evaluating needs about .* free: try a smaller train\.micro_batch_size"):
        run(settings, tmp_path)
    settings.arm = "centralised"
    with pytest.raises(ValueError, match=r"training needs about .* free: try model\.gradient_checkpointing=true"):
        run_alone(settings)


def test_a_models_own_code_runs_on_a_node_only_if_its_owner_agrees(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, "code", codec__artifact=artifact, model__trust_remote_code=True)
    with pytest.raises(FederationError, match="start it with --trust-remote-code if its owner agrees"):
        run(settings, tmp_path)
    grid = InProcessGrid(client_app, 3, {"trust-remote-code": "true", "memory": str(tmp_path / "memory")})
    settings.federation.rounds = 1
    assert len(run_federation(grid, settings).heldout_loss) == 2


def test_a_node_with_another_artifact_is_refused(tmp_path: Path, artifact: str) -> None:
    loaded = load_artifact(Path(artifact), "learned")
    other = Artifact("learned", {**loaded.tensors, "centroids.0": loaded.tensors["centroids.0"] + 1}, loaded.settings)
    save_artifact(other, tmp_path / "other")
    grid = InProcessGrid(client_app, 3, {"codec-artifact": str(tmp_path / "other")})
    with pytest.raises(FederationError, match="copy the server's artifact"):
        run_federation(grid, settings_for(tmp_path, "other-artifact", codec__artifact=artifact))


def test_two_nodes_of_one_partition_are_refused(tmp_path: Path) -> None:
    grid = InProcessGrid(client_app, 3)
    for context in grid.contexts.values():
        context.node_config["partition-id"] = 0
    with pytest.raises(FederationError, match="two nodes hold partition 0"):
        run_federation(grid, settings_for(tmp_path, "twice", arm="dense"))


def test_a_round_without_any_answer_ends_the_run(tmp_path: Path) -> None:
    class DeadGrid(InProcessGrid):
        def answer(self, message: Message) -> Message | None:
            return super().answer(message) if message.metadata.message_type == "query" else None

    settings = settings_for(tmp_path, "dead", arm="dense", federation__rounds=1, federation__round_seconds=0.01)
    grid = DeadGrid(client_app, 3)
    with pytest.raises(FederationError, match=r"0 usable replies.*tried 3 times"):
        run_federation(grid, settings)
    assert len([m for m in grid.sent if m.metadata.message_type == "train"]) == 6
    status = read_status(tmp_path / "dead")
    assert status.state == "failed"
    assert status.faults == 6
    assert "no answer within federation.round_seconds" in status.last_fault


def test_side_information_travels_and_is_the_same_for_all(tmp_path: Path, artifact: str) -> None:
    grid = InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory")})
    run_federation(grid, settings_for(tmp_path, "side", codec__artifact=artifact))
    sides = sides_sent(grid)
    assert [len(side) for side in sides] == [1] * 6
    assert sides[0]["side"].data == sides[1]["side"].data != sides[2]["side"].data
    assert sides[2]["side"].data == sides[3]["side"].data != sides[4]["side"].data


@pytest.mark.parametrize(
    "changes",
    [{"federation__rehearsal_steps": 0}, {"train__lr": 1e30}, {"codec__name": "topk", "codec__artifact": None}],
    ids=["none asked for", "diverged", "of no use"],
)
def test_without_a_rehearsal_the_first_round_has_no_side_information(
    tmp_path: Path, artifact: str, changes: dict[str, object]
) -> None:
    grid = InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory")})
    settings = settings_for(tmp_path, "none", **{"codec__artifact": artifact, "federation__rounds": 1} | changes)
    with contextlib.suppress(ValueError):
        run_federation(grid, settings)
    assert {len(side) for side in sides_sent(grid)} == {0}
    assert "rehearsed" not in (tmp_path / "none" / "events.jsonl").read_text()


def sides_sent(grid: InProcessGrid) -> list[ArrayRecord]:
    trains = [m for m in grid.sent if m.metadata.message_type == "train"]
    return [RecordDict(dict(m.content.items())).array_records.get("side", ArrayRecord()) for m in trains]


def test_a_rehearsal_finds_the_directions_of_the_clients_first_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(tmp_path, "rehearsal", train__steps=6)
    evaluator = Evaluator(settings)
    layout = Layout.of(adapter_shapes(evaluator.model))
    codec = RotatedCodec(layout)
    step = evaluator.rehearse(settings, 6)
    assert step is not None
    side = codec.side_information(layout.to_blocks(step))
    model = load_model(settings.model, settings.lora, settings.seed)
    update, _ = finetune(model, evaluator.initial, evaluator.shards[1].train, settings.train, seed=1)
    error = {}
    for known in (None, side):
        _, left = encode_update(update, None, codec=codec, max_bytes=3072, side=known)
        error[known is None] = float(left.error_RC.square().sum())
    assert error[False] < 0.95 * error[True]
    before = evaluator.loss(evaluator.initial)
    assert evaluator.loss(evaluator.initial) == before
    monkeypatch.setattr("server.run.evaluate.free_bytes", lambda device: 1000)
    assert evaluator.rehearse(settings, 6) is None
    assert "no memory here for federation.rehearsal_steps=6" in caplog.text


class DyingGrid(InProcessGrid):
    """Its server is killed in round 3, when the first client has trained and its reply is under way."""

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if str(message.content.config_records[CONFIG].get("server-round")) == "3":
            raise KeyboardInterrupt
        return reply


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_a_resumed_run_is_the_one_that_was_never_interrupted(tmp_path: Path, artifact: str, strategy: str) -> None:
    changes: dict[str, object] = {
        "codec__artifact": artifact,
        "federation__rounds": 4,
        "strategy__name": strategy,
        "strategy__lr": 0.03 if strategy == "fedadam" else 1.3,
    }
    changes["run_id"] = "same"  # it goes into the payloads' checksums
    whole = run(settings_for(tmp_path, "whole", **changes), tmp_path / "apart")
    with pytest.raises(KeyboardInterrupt):
        run(settings_for(tmp_path, "cut", **changes), tmp_path, DyingGrid)
    assert load_checkpoint(tmp_path / "cut").server_round == 2
    settings = resumed(tmp_path / "cut", ["resume=x", "federation.wait_seconds=7"])
    assert settings.run_id == "same"
    assert settings.federation.wait_seconds == 7
    result = run(settings, tmp_path)
    assert result.heldout_loss == whole.heldout_loss
    assert [u.payload_digest for u in result.uplinks] == [u.payload_digest for u in whole.uplinks]
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(adapter_of(result)[name], tensor)
    assert read_status(tmp_path / "cut").state == "finished"
    with pytest.raises(ValueError, match="all 4 rounds are done"):
        resumed(tmp_path / "cut", [])
    with pytest.raises(ValueError, match=r"train\.lr=1 cannot be changed"):
        resumed(tmp_path / "cut", ["train.lr=1"])
    (tmp_path / "cut" / NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        resumed(tmp_path / "cut", [])


@pytest.mark.parametrize("backend", ["simulation", "superlink"])
def test_a_run_evaluates_while_its_clients_train_and_may_die_of_the_last_evaluation(
    tmp_path: Path, artifact: str, coded: RunResults, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    settings = settings_for(tmp_path, "apart", codec__artifact=artifact, backend__name=backend)
    evaluate, adapters = Evaluator.loss, []

    def dying(self: Evaluator, adapter: Mapping[str, torch.Tensor]) -> float:
        adapters.append(adapter)
        if len(adapters) == 4:
            raise KeyboardInterrupt
        return evaluate(self, adapter)

    monkeypatch.setattr(Evaluator, "loss", dying)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "apart" / "events.jsonl").read_text().splitlines()]
    order = [e["event"] for e in events if e["event"] in ("round_started", "evaluated")]
    assert order == ["round_started", "evaluated"] * 3
    result = run(resumed(tmp_path / "apart", []), tmp_path)
    assert result.heldout_loss == coded.heldout_loss == read_status(tmp_path / "apart").heldout_loss


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint"):
        resumed(tmp_path, [])


class FlakyGrid(InProcessGrid):
    """All replies of the first attempt at round 2 are lost."""

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        asked = [str(m.content.config_records[CONFIG].get("server-round")) for m in self.sent]
        return None if asked[-1] == "2" and asked.count("2") <= 2 else reply


def test_a_round_that_is_tried_again_gives_what_the_first_try_would_have(tmp_path: Path, artifact: str) -> None:
    changes: dict[str, object] = {"codec__artifact": artifact, "federation__round_seconds": 0.5, "run_id": "same"}
    smooth = run(settings_for(tmp_path, "smooth", **changes), tmp_path / "apart")
    flaky = run(settings_for(tmp_path, "flaky", **changes), tmp_path, FlakyGrid)
    assert flaky.heldout_loss == smooth.heldout_loss
    assert [u.payload_digest for u in flaky.uplinks] == [u.payload_digest for u in smooth.uplinks]
    assert len(flaky.faults) == 2


class LateGrid(InProcessGrid):
    """Partition 0 always answers too late."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [
            reply
            for reply in super().pull_messages(message_ids)
            if reply.metadata.message_type == "query" or reply.metadata.src_node_id != 1000
        ]


def test_a_client_that_keeps_failing_rests_and_the_round_waits_for_it_no_longer(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(
        tmp_path,
        "late",
        codec__artifact=artifact,
        federation__rounds=6,
        federation__clients_per_round=3,
        federation__round_seconds=0.3,
        federation__rest_rounds=2,
    )
    results = run(settings, tmp_path, LateGrid)
    assert [(fault.server_round, fault.partition) for fault in results.faults] == [(1, 0), (2, 0), (3, 0), (6, 0)]
    assert "failed 3 times in a row and rests for 2 rounds" in results.faults[2].reason
    assert [fault.rests_until for fault in results.faults[:3]] == [0, 0, results.faults[2].server_round + 2]
    assert results.heldout_loss[-1] < results.heldout_loss[0] - 0.02


class CrashingGrid(InProcessGrid):
    """In round 2 Flower cannot inflate what partition 0 sent."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        asked = str(self.sent[-1].content.config_records[CONFIG].get("server-round"))
        if asked == "2" and any(reply.metadata.src_node_id == 1000 for reply in replies):
            raise DecodeError("Error parsing message")
        return replies


def test_a_reply_that_flower_cannot_read_costs_itself_alone(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, "crash", codec__artifact=artifact, federation__clients_per_round=3)
    results = run(settings, tmp_path, CrashingGrid)
    assert [(fault.server_round, fault.partition) for fault in results.faults] == [(2, 0)]
    assert "cannot be read" in results.faults[0].reason
    assert len(results.uplinks) == 8


class EmptyGrid(InProcessGrid):
    """All nodes leave after the roll call."""

    def get_node_ids(self) -> Iterable[int]:
        return [] if self.sent else super().get_node_ids()


def test_a_round_without_any_node_is_waited_for_and_then_ends_the_run(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(
        tmp_path, "empty", codec__artifact=artifact, federation__wait_seconds=0.2, federation__retries=1
    )
    with pytest.raises(FederationError, match=r"none of the nodes of its 2 clients .*; tried 2 times"):
        run(settings, tmp_path, EmptyGrid)
    assert read_status(tmp_path / "empty").state == "failed"
    assert not (tmp_path / "empty" / "report.html").exists()  # there was no round to report


class LeavingGrid(InProcessGrid):
    """After the roll call the first node is not seen the next ``away`` times that somebody looks."""

    away = 2

    def get_node_ids(self) -> Iterable[int]:
        nodes = list(super().get_node_ids())
        if not self.sent or not self.away:
            return nodes
        self.away -= 1
        return nodes[1:]


def test_a_node_that_comes_back_in_time_loses_nothing(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(tmp_path, "back", codec__artifact=artifact, federation__clients_per_round=3)
    results = run(settings, tmp_path, LeavingGrid)
    assert results.faults == []
    assert len(results.uplinks) == 9


def test_a_node_that_is_gone_for_good_is_waited_for_once(
    tmp_path: Path, artifact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strategies.federated.RETURN_SECONDS", 0.6)
    settings = settings_for(tmp_path, "gone", codec__artifact=artifact, federation__clients_per_round=3)
    looks: list[int] = []

    class GoneGrid(LeavingGrid):
        away = 1000

        def get_node_ids(self) -> Iterable[int]:
            looks.append(sum(message.metadata.message_type == "train" for message in self.sent))
            return super().get_node_ids()

    results = run(settings, tmp_path, GoneGrid)
    assert [(fault.server_round, fault.partition) for fault in results.faults] == [(1, 0), (2, 0), (3, 0)]
    assert "not connected" in results.faults[0].reason
    assert looks.count(0) >= 3  # the roll call, and at least twice for the first round
    assert (looks.count(2), looks.count(4)) == (1, 1)


def test_a_round_with_too_few_replies_is_not_averaged(tmp_path: Path, artifact: str) -> None:
    settings = settings_for(
        tmp_path,
        "enough",
        codec__artifact=artifact,
        federation__clients_per_round=3,
        federation__round_seconds=0.3,
        federation__min_replies=3,
        federation__retries=0,
    )
    with pytest.raises(FederationError, match=r"2 usable replies, federation\.min_replies=3"):
        run(settings, tmp_path, LateGrid)


def test_metrics_are_served_while_the_run_lasts(tmp_path: Path, artifact: str) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]

    class WatchedGrid(InProcessGrid):
        seen = ""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            WatchedGrid.seen = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
            return super().push_messages(messages)

    run(
        settings_for(tmp_path, "watched", codec__artifact=artifact, federation__metrics_port=port),
        tmp_path,
        WatchedGrid,
    )
    figures = dict(line.split() for line in WatchedGrid.seen.splitlines() if not line.startswith("#"))
    assert figures["cgfedllm_rounds"] == "3.0"
    assert figures["cgfedllm_rounds_finished"] == "2.0"
    assert float(figures["cgfedllm_uplink_payload_bytes_total"]) > 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_fltrust_judges_by_the_servers_own_update(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", arm="dense", strategy__name="fltrust")
    settings.federation.rounds = 2
    losses = run(settings, tmp_path).heldout_loss
    assert losses[-1] < losses[0]
