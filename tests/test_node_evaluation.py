"""Evaluation on the nodes, and a server that holds neither base model nor text, on the real loop."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcessGrid, apply_changes
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from safetensors.torch import load_file
from test_federation import run, settings_for

from adapters.model import get_adapter, load_model, outline_model
from adapters.settings import LoraSettings, ModelSettings
from bench.deployment import deployment
from bench.drop_outs import Run
from client.app import app as client_app
from client.trainer import Trainer
from client.work import Work
from conf.checks import check_settings
from conf.console import Display
from conf.schema import Settings
from privacy.errors import PrivacyError
from server.federate import resumed
from server.live.progress import RunView
from server.plan import plan_of
from server.records.events import read_status
from server.records.node_losses import federated_losses
from server.records.results import RunResults
from server.records.trained import read_trained
from server.run.federation import run_federation
from strategies.evaluation import Bounds, judged, panel
from strategies.outcomes import NodeLoss
from strategies.receive import Refused
from strategies.wire import (
    ARRAYS,
    CONFIG,
    HELDOUT_LOSS,
    HELDOUT_TOKENS,
    HELDOUT_WINDOWS,
    METRICS,
    MOST_LOSS,
    PARTITION,
    SECONDS_EVALUATE,
    SERVER_ROUND,
)

HOSTILE = 1007  # the node of partition 1
BOUNDS = Bounds(max_windows=4, window=32)


class Watched(InProcessGrid):
    """Counts arrays by the kind of message that brings them."""

    def sent_bytes(self, kind: str) -> int:
        sent = [m.content for m in self.sent if m.metadata.message_type == kind]
        return sum(len(array.data) for content in sent for array in content.array_records[ARRAYS].values())

    def evaluated(self) -> list[int]:
        """The rounds of all messages that asked for a loss."""
        asked = [m for m in self.sent if m.metadata.message_type == "evaluate"]
        return [int(str(m.content.config_records[CONFIG][SERVER_ROUND])) for m in asked]


@pytest.fixture(scope="module")
def base_less(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that such a server has of the base model."""
    folder = tmp_path_factory.mktemp("server") / "tiny-llama"
    folder.mkdir()
    shutil.copy("assets/tiny-llama/config.json", folder)
    return folder


def watched(settings: Settings, folder: Path, **node: str) -> tuple[RunResults, Watched]:
    grid = Watched(client_app, settings.federation.num_clients, {"memory": str(folder / "memory"), **node})
    return run_federation(grid, settings), grid


def adapter_of(results: RunResults) -> dict[str, torch.Tensor]:
    return load_file(Path(results.settings.output) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResults, Watched]:
    """Coded both ways, of five rounds; every second one is evaluated."""
    folder = tmp_path_factory.mktemp("both-ways")
    settings = settings_for(folder, "run", codec__down_bits=0.5, federation__rounds=5, federation__evaluate_every=2)
    return watched(settings, folder)


def test_what_nodes_say_is_what_the_server_measures_on_the_same_windows(both_ways: tuple[RunResults, Watched]) -> None:
    results, grid = both_ways
    assert grid.evaluated() == [0, 0, 0, 2, 2, 2, 4, 4, 4, 5, 5, 5]
    assert not results.faults
    losses = results.federated_loss
    assert [one.server_round for one in losses] == [0, 2, 4, 5]
    for one in losses:
        assert one.loss == pytest.approx(results.heldout_loss[one.server_round], rel=1e-5)
        assert [answer.partition for answer in one.answers] == [0, 1, 2]
        assert len({answer.loss for answer in one.answers}) == 3, "each has text of its own"
    assert results.deciding_losses == dict(enumerate(results.heldout_loss)), "its own text decides, where it has some"
    assert results.final_loss == results.heldout_loss[-1]


def test_all_bytes_of_an_evaluation_are_counted_and_what_it_brings_is_not_brought_again(
    both_ways: tuple[RunResults, Watched],
) -> None:
    results, grid = both_ways
    account = results.account()
    down = sum(one.total_bytes for one in results.downlinks if one.evaluating)
    up = sum(one.answer_bytes for one in results.node_losses)
    assert down == grid.sent_bytes("evaluate") > 0
    assert account.down == grid.sent_bytes("evaluate") + grid.sent_bytes("train")
    assert account.evaluation == down + up
    assert 12 * 50 < up < 12 * 400
    assert account.up == up + sum(one.payload_bytes for one in results.uplinks)
    empty = min(one.total_bytes for one in results.downlinks)
    after = [one for one in results.downlinks if not one.evaluating and one.server_round in (3, 5)]
    assert after and all(one.total_bytes == empty for one in after), "they hold it since they were asked for their loss"
    assert account.delivery == 3 * empty, "the last evaluation was the delivery"
    of_clients = results.accounts_of_clients().values()
    assert sum(one.evaluation for one in of_clients) == account.evaluation


def test_results_events_status_and_card_say_what_nodes_said(both_ways: tuple[RunResults, Watched]) -> None:
    results, _ = both_ways
    output = Path(results.settings.output)
    content = json.loads((output / "results.json").read_text())
    last = content["federated_loss"][-1]
    by_client = {one.partition: one.loss for one in results.node_losses if one.server_round == 5}
    assert last["by_client"] == {str(partition): loss for partition, loss in by_client.items()}
    assert last["worst"] == max(by_client.values()) == by_client[last["worst_client"]]
    assert (last["clients"], last["windows"], last["tokens"]) == (3, 12, 12 * 31)
    assert last["worse_than_base"] == 0
    again = RunResults.of_state(results.settings, json.loads(json.dumps(content)))
    assert again.node_losses == results.node_losses
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    said = [event for event in events if event["event"] == "evaluated_on_nodes"]
    assert [(event["server_round"], event["clients"], event["asked"]) for event in said] == [
        (number, 3, 3) for number in (0, 2, 4, 5)
    ]
    status = read_status(output)
    assert status.node_losses == {one.server_round: one.loss for one in results.federated_loss}
    assert status.worst_client == f"{last['worst']:.4f} (client {last['worst_client']})"
    assert (status.bytes_down, status.faults) == (content["bytes"]["down"], 0)
    card = (output / "adapter" / "README.md").read_text()
    assert f"{last['loss']:.4f} after round 5, 3 clients" in card
    assert "0% of the clients worse than before the first round" in card


class Lines(Display):
    """A display without a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        self.told.append(text)

    def show(self, done: float, total: float, text: str) -> None:
        raise AssertionError("there is no bar")


def test_what_a_person_sees_of_a_server_without_base_model() -> None:
    shown = Lines()
    view = RunView(shown)
    sizes = {"partition": 0, "catch_up_bytes": 0, "snapshot_bytes": 0, "side_bytes": 0}
    events: list[tuple[str, dict[str, Any]]] = [
        ("run_started", {"arm": "dense", "rounds": 2, "base": "none"}),
        ("downlink", {"server_round": 0, "step_bytes": 1000, "evaluating": True, **sizes}),
        (
            "evaluated_on_nodes",
            {"server_round": 0, "loss": 3.6, "worst": 4.0, "worst_client": 2, "clients": 3, "asked": 3},
        ),
        ("downlink", {"server_round": 1, "step_bytes": 500, "evaluating": False, **sizes}),
        ("round_started", {"server_round": 1, "clients": 1}),
        ("uplink", {"server_round": 1, "partition": 0, "payload_bytes": 100}),
        ("round_finished", {"server_round": 1}),
        ("evaluated_on_nodes", {"server_round": 1, "clients": 0, "asked": 3}),
    ]
    for number, (event, fields) in enumerate(events):
        view({"time": 1e9 + number, "event": event, **fields})
    assert shown.told == [
        "dense, 2 rounds",
        "on the nodes after round 0: loss 3.6000, worst 4.0000 (client 2), 3 of 3 clients",
        "round 1 of 2: 1 of 1 clients (0), 100 B up and 500 B down each, 0:00:02 left",
        "on the nodes after round 1: no loss, 0 of 3 clients",
    ]
    assert (view.status.bytes_down, view.status.bytes_evaluating) == (1500, 1000)


def test_fairness() -> None:
    said = [NodeLoss(0, 0, 3.0, 10, 1, 0.1), NodeLoss(0, 1, 4.0, 30, 1, 0.1), NodeLoss(0, 2, 2.0, 10, 1, 0.1)]
    said += [NodeLoss(4, 0, 2.0, 10, 1, 0.1), NodeLoss(4, 1, 4.5, 30, 1, 0.1), NodeLoss(4, 3, 1.0, 10, 1, 0.1)]
    first, last = federated_losses(said)
    assert first.loss == (3 * 10 + 4 * 30 + 2 * 10) / 50
    assert (last.loss, last.middle, last.worst.partition) == ((20 + 135 + 10) / 50, 2.0, 1)
    assert last.spread == pytest.approx(math.sqrt(((2 - 2.5) ** 2 + (4.5 - 2.5) ** 2 + (1 - 2.5) ** 2) / 3))
    assert last.worse_than_before == 0.5, "of client 3 nothing is known from before"
    assert federated_losses(said[3:])[0].worse_than_before is None


def test_a_dense_run_trains_the_same_whether_nodes_are_asked_or_not(tmp_path: Path) -> None:
    changes: dict[str, object] = {"arm": "dense", "run_id": "same", "federation__rounds": 2}
    plain = run(settings_for(tmp_path, "plain", **changes), tmp_path / "plain-memory")
    settings = settings_for(tmp_path, "asked", federation__evaluate_every=1, federation__evaluate_clients=2, **changes)
    asked, grid = watched(settings, tmp_path)
    assert [u.payload_digest for u in asked.uplinks] == [u.payload_digest for u in plain.uplinks]
    assert asked.heldout_loss == plain.heldout_loss
    chosen = panel(3, 2, settings.seed)
    assert {(one.server_round, one.partition) for one in asked.node_losses} == {
        (number, partition) for number in range(3) for partition in chosen
    }
    assert grid.sent_bytes("evaluate") == asked.account().down - plain.account().down
    assert plain.account().evaluation == 0 and not plain.federated_loss
    planned, meant = plan_of(settings).account(), asked.account()
    assert planned is not None
    assert planned.evaluation == 6 * 4 * asked.num_parameters
    assert 0 < meant.evaluation - planned.evaluation < 0.1 * planned.evaluation, "safetensors' heads, and the answers"


def answer_of(**changes: Any) -> Message:
    said: dict[str, Any] = {
        PARTITION: 1,
        SERVER_ROUND: 2,
        HELDOUT_LOSS: 3.5,
        HELDOUT_TOKENS: 124,
        HELDOUT_WINDOWS: 4,
        SECONDS_EVALUATE: 0.5,
    }
    said |= {key.replace("_", "-"): value for key, value in changes.items()}
    asked = Message(RecordDict(), HOSTILE, "evaluate")
    asked.metadata.__dict__["_message_id"] = "asked"
    kept = {key: value for key, value in said.items() if value is not None}
    return Message(RecordDict({METRICS: MetricRecord(kept)}), reply_to=asked)


def test_an_honest_answer_is_taken() -> None:
    found = judged(answer_of(), 2, 1, BOUNDS)
    assert isinstance(found, NodeLoss)
    assert asdict(found) | {"answer_bytes": 0} == asdict(NodeLoss(2, 1, 3.5, 124, 4, 0.5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heldout_loss": math.nan}, "not finite"),
        ({"heldout_loss": -0.1}, "says heldout-loss -0.1: between 0 and 1000"),
        ({"heldout_loss": MOST_LOSS * 1.001}, "says heldout-loss 1001"),
        ({"heldout_loss": [1.0, 2.0]}, "a number is expected"),
        ({"heldout_loss": 10**400}, "larger than a float"),
        ({"heldout_tokens": 125}, "says heldout-tokens 125: between 4 and 124"),
        ({"heldout_tokens": 3}, "says heldout-tokens 3"),
        ({"heldout_tokens": 99.5}, "no whole numbers"),
        ({"heldout_windows": 5, "heldout_tokens": 20}, "says heldout-windows 5: between 1 and 4"),
        ({"heldout_windows": 0, "heldout_tokens": 0}, "says heldout-windows 0"),
        ({"seconds_evaluate": -1.0}, "says seconds-evaluate -1"),
        ({"partition_id": 0}, "answers for partition 0 and round 2"),
        ({"server_round": 1}, "answers for partition 1 and round 1"),
        ({"heldout_loss": None}, "is not one record of"),
        ({"more": 1.0}, "is not one record of"),
    ],
)
def test_answers_that_are_none(changes: dict[str, Any], said: str) -> None:
    found = judged(answer_of(**changes), 2, 1, BOUNDS)
    assert isinstance(found, Refused)
    assert said in found.reason


class Lying(Watched):
    """Partition 1 trains as it should, and says something else of its loss each time."""

    answers: Iterator[Callable[[Message, Message], Message]] = iter(
        [
            lambda asked, reply: reply,
            lambda asked, reply: Message(Error(ErrorCode.UNKNOWN, "\x1b[31mred"), reply_to=asked),
            lambda asked, reply: Message(RecordDict({**reply.content, "more": MetricRecord({"x": 1})}), reply_to=asked),
            lambda asked, reply: Message(RecordDict(), reply_to=asked),
        ]
    )

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        if reply is None or message.metadata.message_type != "evaluate" or message.metadata.dst_node_id != HOSTILE:
            return reply
        return next(self.answers)(message, reply)


class Silent(Watched):
    """No answer about a loss ever comes."""

    def answer(self, message: Message) -> Message | None:
        return None if message.metadata.message_type == "evaluate" else super().answer(message)


def test_lies_cost_their_node_a_fault_and_nothing_else(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "lying", arm="dense", federation__evaluate_every=1, federation__max_failures=1)
    results = run(settings, tmp_path, Lying)
    assert [(fault.server_round, fault.partition, fault.evaluating) for fault in results.faults] == [
        (1, 1, True), (2, 1, True), (3, 1, True),
    ]  # fmt: skip
    assert results.faults[0].reason == "red"
    assert [len(one.answers) for one in results.federated_loss] == [3, 2, 2, 2]
    table = results.participation()
    assert all(row["asked"] == row["accepted"] for row in table.values()), "it is no failure in training"
    assert sum(row["asked"] for row in table.values()) == 6


def test_too_few_answers_are_said_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_for(tmp_path, "silent", arm="dense", federation__rounds=2, federation__evaluate_every=1)
    settings.federation.round_seconds = 0.2
    results = run(settings, tmp_path, Silent)
    assert len(results.heldout_loss) == 3
    assert results.federated_loss == []
    assert len(results.faults) == 9
    assert read_status(tmp_path / "silent").state == "finished"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"federation__evaluate_every": -1}, r"federation\.evaluate_every=-1 must be at least 0"),
        ({"federation__evaluate_clients": 4}, r"federation\.evaluate_clients=4 must lie between 1 and .*num_clients=3"),
        ({"federation__evaluate_every": 2, "arm": "base"}, "arm=base asks no clients"),
        (
            {"federation__evaluate_every": 2, "privacy__name": "client_dp"},
            r"withhold their losses .*\.evaluate_every=0",
        ),
        (
            {"federation__evaluate_every": 2, "privacy__secure_aggregation": True, "codec__bits": 1.0},
            r"privacy\.secure_aggregation=true do not go together: nodes withhold",
        ),
        ({"server__base": "half"}, "server.base='half' is none of whole, none"),
        ({"server__base": "none", "arm": "centralised"}, "arm=centralised runs on the server itself"),
        ({"server__base": "none", "strategy__name": "fltrust"}, "trains on the server's own text"),
        (
            {"server__base": "none", "codec__basis": "model"},
            r"codec\.basis=auto, moves or artifact, or a codec without",
        ),
        ({"server__base": "none", "privacy__secure_aggregation": True}, "a rehearsal on the server's base model"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    settings = settings_for(tmp_path, "run")
    settings.federation.clients_per_round = 3
    apply_changes(settings, changes)
    with pytest.raises(ValueError, match=said):
        check_settings(settings)


def test_a_node_withholds_its_loss_whatever_a_server_asks(tmp_path: Path) -> None:
    protected = settings_for(tmp_path, "run", arm="dense", privacy__name="client_dp", privacy__noise_multiplier=1.0)
    work = Work({}, None, 0, 1, "", tmp_path / "memory" / "run")
    with pytest.raises(PrivacyError, match="withheld"):
        Trainer(protected).evaluate(work)
    open_one = settings_for(tmp_path, "run", arm="dense")
    with pytest.raises(PrivacyError, match="takes part in runs with a privacy budget alone"):
        Trainer(open_one, max_epsilon=3.0).evaluate(work)
    (work.memory / "privacy-terms-0.txt").parent.mkdir(parents=True)
    (work.memory / "privacy-terms-0.txt").write_text("those of a run that protects")
    with pytest.raises(PrivacyError, match="on other terms of privacy"):
        Trainer(open_one).evaluate(work)


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("float32", "int8"), ("float32", "nf4")]
)
def test_shapes_alone_give_the_adapter_that_the_seed_gives(base_less: Path, dtype: str, quantization: str) -> None:
    here = ModelSettings(path=str(base_less), dtype=dtype, quantization=quantization)
    there = ModelSettings(path="assets/tiny-llama", dtype=dtype, quantization=quantization, device="cpu")
    lora = LoraSettings(rank=4, target_modules=["all-linear"])
    made, true = get_adapter(outline_model(here, lora, 5)), get_adapter(load_model(there, lora, 5))
    assert list(made) == list(true)
    assert all(torch.equal(made[name], tensor) for name, tensor in true.items())
    assert any(tensor.abs().max() > 0 for tensor in made.values())


def test_a_model_that_is_stored_quantised_cannot_be_known_by_its_shapes(base_less: Path, tmp_path: Path) -> None:
    config = json.loads((base_less / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is stored quantised"):
        outline_model(ModelSettings(path=str(tmp_path)), LoraSettings(), 0)


def test_a_server_without_base_model_makes_the_same_run(tmp_path: Path, base_less: Path) -> None:
    changes: dict[str, object] = {"run_id": "same", "codec__basis": "moves", "federation__rehearsal_steps": 0}
    changes |= {"codec__down_bits": 0.5, "federation__evaluate_every": 1}
    whole = run(settings_for(tmp_path, "whole", **changes), tmp_path / "apart")
    settings = settings_for(tmp_path, "none", **changes, server__base="none", model__path=str(base_less))
    settings.codec.basis, settings.federation.rehearsal_steps = "auto", 6
    settings.task.path = None
    none, _ = watched(settings, tmp_path, **{"model-path": str(Path("assets/tiny-llama").absolute())})
    assert none.settings.codec.basis == "moves"
    assert [u.payload_digest for u in none.uplinks] == [u.payload_digest for u in whole.uplinks]
    assert none.heldout_loss == []
    assert [one.loss for one in none.federated_loss] == [one.loss for one in whole.federated_loss]
    assert none.deciding_losses == {one.server_round: one.loss for one in none.federated_loss}
    assert none.final_loss == pytest.approx(whole.heldout_loss[-1], rel=1e-5)
    for name, tensor in adapter_of(whole).items():
        assert torch.equal(adapter_of(none)[name], tensor)
    configs = [
        json.loads((tmp_path / name / "adapter" / "adapter_config.json").read_text()) for name in ("whole", "none")
    ]
    assert configs[0].pop("base_model_name_or_path") != configs[1].pop("base_model_name_or_path")
    assert configs[0] == configs[1]
    card = (tmp_path / "none" / "adapter" / "README.md").read_text()
    assert "not measured by the server, which held neither base model nor text" in card
    read = read_trained(str(tmp_path / "none"), [f"model.path={Path('assets/tiny-llama').absolute()}"])
    read.load_model()  # on a host with the base model


def test_a_server_without_base_model_goes_on_from_its_checkpoint(tmp_path: Path, base_less: Path) -> None:
    class Dying(Watched):
        def answer(self, message: Message) -> Message | None:
            reply = super().answer(message)
            if message.metadata.message_type == "train" and message.content.config_records[CONFIG][SERVER_ROUND] == 3:
                raise KeyboardInterrupt
            return reply

    own = {"memory": str(tmp_path / "memory"), "model-path": str(Path("assets/tiny-llama").absolute())}
    changes: dict[str, object] = {"server__base": "none", "model__path": str(base_less), "arm": "dense"}
    settings = settings_for(tmp_path, "cut", **changes, federation__evaluate_every=2)
    with pytest.raises(KeyboardInterrupt):
        run_federation(Dying(client_app, 3, own), settings)
    results = run_federation(Watched(client_app, 3, own), resumed(tmp_path / "cut", []))
    assert [one.server_round for one in results.federated_loss] == [0, 2, 3]
    assert results.federated_loss[-1].loss < results.federated_loss[0].loss - 0.05
    assert results.settings.server.base == "none"


class Diverging(Watched):
    """From round 2 on two of three nodes say that they lost far too much in training, or of the adapter."""

    kind, key = "train", "train-loss"

    def answer(self, message: Message) -> Message | None:
        reply = super().answer(message)
        config = message.content.config_records[CONFIG]
        asked = message.metadata.message_type == self.kind and config.get(SERVER_ROUND) == 2
        if reply is not None and asked and message.metadata.dst_node_id != 1000:
            reply.content.metric_records[METRICS][self.key] = 999.0
        return reply


class DivergingOnNodes(Diverging):
    kind, key = "evaluate", HELDOUT_LOSS


@pytest.mark.parametrize(
    ("grid", "every", "said"),
    [
        (Diverging, 0, "median client's training loss in round 2 is 999.*adapter of round 0 is in"),
        (DivergingOnNodes, 1, "median client's loss on the nodes after round 2 is 999.*adapter of round 1 is in"),
    ],
)
def test_without_base_model_the_median_client_says_that_training_diverged(
    tmp_path: Path, base_less: Path, grid: type[Diverging], every: int, said: str
) -> None:
    own = {"memory": str(tmp_path / "memory"), "model-path": str(Path("assets/tiny-llama").absolute())}
    changes: dict[str, object] = {"server__base": "none", "model__path": str(base_less), "arm": "dense"}
    settings = settings_for(tmp_path, "run", **changes, federation__clients_per_round=3)
    settings.federation.evaluate_every = every
    with pytest.raises(ValueError, match=said):
        run_federation(grid(client_app, 3, own), settings)


@pytest.mark.grpc
@pytest.mark.timeout(600)
def test_a_federation_over_grpc_whose_server_has_neither_base_model_nor_text(tmp_path: Path, base_less: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for source in sorted(Path("tests").glob("test_[a-d]*.py")):
        (texts / f"{source.stem}.txt").write_text(source.read_text())
    model = ["--model-path", str(Path("assets/tiny-llama").absolute()), "--task-path", str(texts)]
    small = [
        "federation.rounds=2",
        "train.steps=4",
        "train.batch_size=4",
        "train.micro_batch_size=4",
        "task.window=64",
        "task.heldout_windows=4",
    ]
    sizes = [
        "federation.num_clients=2",
        "federation.clients_per_round=2",
        "codec.down_bits=0.5",
        "task.max_windows=100",
    ]
    asked = ["server.base=none", f"model.path={base_less}", "task=text", "task.path=/nowhere/here"]
    with deployment(tmp_path / "lab", 2, model) as running:
        results = Run(running, [*small, *sizes, *asked, "federation.evaluate_every=1"]).results()
        seen = {path.name for path in running.folder.glob("logs-*/trainer-*.log")}
        assert len(seen) == 2
    assert (results["heldout_loss"], results["faults"]) == ([], [])
    losses = [one["loss"] for one in results["federated_loss"]]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert all(one["clients"] == 2 for one in results["federated_loss"])
    assert 0 < results["bytes"]["evaluation"] < results["bytes"]["total"]
    assert (running.folder / "run" / "adapter" / "adapter_model.safetensors").is_file()
