"""Trackers: what they are told can be read back by their own libraries, and none of them ends or betrays a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import server.live.tracking
from conf import CHECKOUT
from conf.schema import TRACKERS, Settings, register_schemas, settings_of
from server.federate import resumed, run
from server.live.trackers import FAILED, database
from server.live.tracking import LIBRARIES, Told, Tracker, Tracking, told_settings, tracked
from server.records.events import EventLog
from server.records.results import RunResults
from strategies.outcomes import DOWNLINK_BYTES

register_schemas()
TINY = [
    "backend=inprocess",
    "federation.rounds=2",
    "federation.num_clients=2",
    "federation.clients_per_round=2",
    "train.steps=1",
    "task.heldout_windows=2",
    "run_id=abc123",
]


def composed(*overrides: str) -> Settings:
    with initialize_config_dir(str(CHECKOUT / "conf"), version_base="1.3"):
        return settings_of(compose("federate", [*TINY, *overrides]))


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rounds: list[tuple[int, Mapping[str, float]]] = []
        self.ended: list[tuple[str, Mapping[str, str], Mapping[str, float]]] = []

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.rounds.append((step, figures))

    def end(self, state: str, facts: Mapping[str, str], totals: Mapping[str, float]) -> None:
        self.ended.append((state, facts, totals))


ROUND: list[tuple[str, dict[str, Any]]] = [
    ("evaluated", {"server_round": 0, "heldout_loss": 3.5}),
    ("round_started", {"server_round": 1, "clients": 3}),
    ("downlink", {"server_round": 1, "partition": 7, **dict(zip(DOWNLINK_BYTES, (5, 1, 0, 2), strict=True))}),
    ("uplink", {"server_round": 1, "partition": 7, "payload_bytes": 10, "train_loss": 2.0}),
    ("uplink", {"server_round": 1, "partition": 8, "payload_bytes": 12, "train_loss": 4.0}),
    ("fault", {"server_round": 1, "partition": 9, "reason": "/home/x is full", "kind": "failed", "node": 3}),
    ("round_finished", {"server_round": 1}),
    ("round_started", {"server_round": 2, "clients": 3}),
    ("evaluated", {"server_round": 1, "heldout_loss": 3.4}),
]


def told(settings: Settings) -> Kept:
    kept = Kept()
    thread = Told("kept", lambda: kept)
    tracking = Tracking(settings, [thread])
    for number, (kind, fields) in enumerate(ROUND):
        tracking({"time": 100.0 + number, "event": kind, **fields})
    tracking.end(FAILED)
    return kept


def test_a_round_is_told_by_its_number_whenever_it_is_evaluated() -> None:
    kept = told(Settings())
    assert kept.rounds == [
        (0, {"heldout_loss": 3.5}),
        (
            1,
            {"bytes_up": 22, "bytes_down": 8, "answers": 2, "faults": 1, "seconds": 5.0, "train_loss": 3.0},
        ),
        (1, {"heldout_loss": 3.4}),
    ]
    assert kept.ended == [(FAILED, {}, {})]


def test_what_privacy_withholds_is_not_told() -> None:
    settings = Settings()
    settings.privacy.secret_sampling = True
    assert told(settings).rounds == [(0, {"heldout_loss": 3.5}), (1, {"seconds": 5.0}), (1, {"heldout_loss": 3.4})]


def test_settings_are_told_without_places() -> None:
    settings = composed("task=jsonl", "task.path=/home/somebody/ward-7.jsonl", "output=/srv/out", "lora.start=/x/y")
    flat = told_settings(settings)
    assert flat["task.path"] == "ward-7.jsonl" and flat["lora.start"] == "y" and flat["codec.bits"] == "0.5"
    assert flat["codec.artifact"] == "null"
    assert not [value for value in flat.values() if "/" in value]
    assert "output" not in flat


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_named_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.live.tracking, "find_spec", lambda module: None)
    settings = composed(f"federation.trackers=[{name}]", f"output={tmp_path}")
    with pytest.raises(ValueError, match=rf"which is not installed: pip install 'cg-fedllm\[{name}\]'"):
        run(settings)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_tracker_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Kept):
        def figures(self, step: int, figures: Mapping[str, float]) -> None:
            raise OSError(28, "No space left on device")

    class Away(Kept):
        def __init__(self) -> None:
            raise ConnectionError("no server")

    built: dict[str, Callable[[], Tracker]] = {"tensorboard": Full, "mlflow": Away, "wandb": Kept}
    monkeypatch.setattr(server.live.tracking, "find_spec", lambda module: True)
    monkeypatch.setattr(server.live.tracking, "open_tracker", lambda name, about: built[name]())
    settings = composed("federation.trackers=[tensorboard,mlflow,wandb]", f"output={tmp_path}")
    events = EventLog(tmp_path)
    with tracked(settings, events) as tracking:
        for kind, fields in ROUND:
            events.write(kind, **fields)
        tracking.finish(RunResults(settings, 10, [3.5, 3.4]))
    said = capsys.readouterr().err
    assert said.count("the tracker tensorboard fails, and the run goes on without it") == 1
    assert said.count("the tracker mlflow fails") == 1 and "no server" in said
    assert "wandb" not in said
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == len(ROUND)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds that all trackers were told of, and one round more when it was resumed."""
    for name in TRACKERS:
        pytest.importorskip(LIBRARIES[name])
    folder = tmp_path_factory.mktemp("tracked")
    run(composed("federation.trackers=[tensorboard,mlflow,wandb]", f"output={folder}"))
    run(resumed(folder, ["federation.rounds=3"]))
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def bytes_of(results: dict[str, Any], server_round: int) -> int:
    return sum(one["payload_bytes"] for one in results["uplinks"] if one["server_round"] == server_round)


def test_tensorboard_reads_it(output: Path, results: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(output / "tensorboard"))
    board.Reload()
    losses = {one.step: one.value for one in board.Scalars("heldout_loss")}
    assert losses == pytest.approx(dict(enumerate(results["heldout_loss"])), rel=1e-6)
    assert {one.step: one.value for one in board.Scalars("bytes_up")} == {n: bytes_of(results, n) for n in (1, 2, 3)}
    assert board.Scalars("total_bytes")[-1].value == results["bytes"]["total"]
    assert b"codec.bits" in board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_mlflow_reads_it(output: Path, results: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(database(output / "mlflow"))
    (experiment,) = [one for one in client.search_experiments() if one.name == "cg-fedllm"]
    (one,) = client.search_runs([experiment.experiment_id])
    assert one.info.status == "FINISHED"
    losses = {metric.step: metric.value for metric in client.get_metric_history(one.info.run_id, "heldout_loss")}
    assert losses == dict(enumerate(results["heldout_loss"]))
    sent = {metric.step: metric.value for metric in client.get_metric_history(one.info.run_id, "bytes_up")}
    assert sent == {n: bytes_of(results, n) for n in (1, 2, 3)}
    assert one.data.params["codec.bits"] == "0.5" and one.data.params["federation.rounds"] == "2"
    assert one.data.tags["resumed.federation.rounds"] == "3"
    assert one.data.metrics["total_bytes"] == results["bytes"]["total"]
    assert one.data.tags["codec"] == "learned"
    assert str(output) not in json.dumps([one.data.params, one.data.tags])


def test_wandb_reads_it(output: Path, results: dict[str, Any]) -> None:
    rows, config, summary = read_wandb(output / "wandb")
    losses = {row["round"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    assert losses == pytest.approx(dict(enumerate(results["heldout_loss"])))
    assert {row["round"]: row["bytes_up"] for row in rows if "bytes_up" in row} == {
        n: bytes_of(results, n) for n in (1, 2, 3)
    }
    assert config["codec.bits"] == "0.5"
    assert summary["total_bytes"] == results["bytes"]["total"]


def read_wandb(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Rows, config and summary of the offline runs in the folder, which are parts of one run."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    files = sorted(folder.glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {"run-abc123"}
    for file in files:
        store = DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                rows.append(
                    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            summary |= {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.summary.update}
    return rows, config, summary
