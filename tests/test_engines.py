"""The same federation on Flower's two engines: Ray simulation, and a real deployment over gRPC on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "federation.rounds=2",
    "train.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "task.window=32",
    "task.max_windows=200",
    "task.heldout_windows=4",
]


def run_module(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_tgap_records_in_simulation_trains_and_federates_with_its_artifact(tmp_path: Path) -> None:
    few = [*SMALL, "federation.num_clients=4", "federation.clients_per_round=3"]
    tgap = ["tgap.passes=2", "tgap.network_steps=2", "tgap.heldout_rounds=1", "tgap.heldout_clients=1"]
    places = [f"tgap.artifact={tmp_path / 'codec'}", f"output={tmp_path / 'tgap'}", f"hydra.run.dir={tmp_path / 'h'}"]
    said = run_module("tgap", *few, *tgap, *places)
    report = json.loads((tmp_path / "tgap" / "report.json").read_text())["fidelity"]
    assert {row["codec"] for row in report} == {"learned", "resnet", "resnet-literal"}
    assert all(0 < row["bits"] <= (row["bits_requested"] or 40) for row in report)
    assert "resnet-literal" in said
    learned = [row for row in report if row["codec"] == "learned" and row["bits_requested"] == 1.0]
    assert min(row["cosine"] for row in learned) > 0.5

    said = run_module(
        "server.federate",
        *("codec=learned", f"codec.artifact={tmp_path / 'codec'}", f"output={tmp_path / 'run'}"),
        *(f"hydra.run.dir={tmp_path / 'h2'}", *few),
    )
    run = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(run["heldout_loss"]) == 3
    assert len(run["uplinks"]) == 6
    assert 0 < run["bits_per_parameter"] <= 0.5
    assert f"results in {tmp_path / 'run'}" in said


@pytest.mark.grpc
@pytest.mark.timeout(600)
def test_grpc_and_simulation_send_the_same_payloads(tmp_path: Path) -> None:
    run_module("bench.demo_grpc", "--rounds", "2", "--output", str(tmp_path), *SMALL[1:])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["payloads_equal"]
    assert len(results["payload_digests"]["grpc"]) == 4
    assert results["heldout_loss"]["grpc"] == results["heldout_loss"]["simulation"]
    for wire in results["wire_bytes_per_client"]:
        assert wire["up"]["all"] > 2 * results["payload_bytes_per_client_round"] + wire["up"]["polling"]
        assert wire["up"]["polling"] > 0
    for log in (tmp_path / "demo-deploy").glob("*.log"):
        assert "Traceback" not in log.read_text(errors="replace"), log


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_sweep_runs_every_combination_and_keeps_the_results_apart(tmp_path: Path) -> None:
    few = [*SMALL[1:], "federation.rounds=1", "federation.num_clients=2", "federation.clients_per_round=2"]
    run_module("server.federate", "-m", "codec=learned,identity", f"hydra.sweep.dir={tmp_path}", *few)
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")}
    assert len(found) == 2
    bits = sorted(run["bits_per_parameter"] for run in found.values())
    assert bits[0] <= 0.5
    assert bits[1] == pytest.approx(32, abs=0.1)
