"""The same federation on Flower's two engines: Ray simulation, and a real deployment over gRPC on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import InProcessGrid

from client.app import app as client_app
from conf.schema import Settings
from server.records.events import read_status
from server.run.federation import run_federation

SMALL = [
    "federation.rounds=2",
    "train.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "task.window=32",
    "task.max_windows=200",
    "task.heldout_windows=4",
    f"backend.client_cpus={os.cpu_count()}",  # one process for all clients: each takes ten seconds
]


def run_module(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_tgap_records_in_simulation_and_trains_and_a_sweep_federates_with_its_artifact(tmp_path: Path) -> None:
    few = [*SMALL, "federation.num_clients=4", "federation.clients_per_round=3"]
    tgap = ["tgap.passes=2", "tgap.network_steps=2", "tgap.bits=[1.0]"]
    tgap += ["tgap.heldout_rounds=1", "tgap.heldout_clients=1"]
    places = [f"tgap.artifact={tmp_path / 'codec'}", f"output={tmp_path / 'tgap'}", f"hydra.run.dir={tmp_path / 'h'}"]
    said = run_module("tgap", *few, *tgap, *places)
    report = json.loads((tmp_path / "tgap" / "report.json").read_text())["fidelity"]
    assert {row["codec"] for row in report} == {"learned", "resnet", "resnet-literal"}
    assert all(0 < row["bits"] <= (row["bits_requested"] or 40) for row in report)
    assert "resnet-literal" in said
    learned = [row for row in report if row["codec"] == "learned" and row["bits_requested"] == 1.0]
    assert min(row["cosine"] for row in learned) > 0.5

    # a sweep with the artifact; a folder whose name holds what Hydra's grammar and rich would take for their own
    folder = tmp_path / "a=b ([x])"
    command = [sys.executable, "-m", "server.federate", "-m", "codec.feedback=2,0.5"]  # the first is refused
    command += ["--codec-artifact", str(tmp_path / "codec"), "--output", str(folder), *few]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    failed, finished = json.loads((folder / "summary.json").read_text())["jobs"]
    assert (failed["state"], finished["state"]) == ("failed", "finished")
    assert finished["label"] == "coded (learned at 0.5 bits)"
    run = json.loads((Path(finished["folder"]) / "results.json").read_text())
    assert len(run["heldout_loss"]) == 3
    assert len(run["uplinks"]) == 6
    assert 0 < run["bits_per_parameter"] <= 0.5
    assert "error: 1 of 2 jobs did not finish" in done.stderr
    assert re.search(r"round 1 of 2: 3 of 3 clients \(", done.stderr)
    for text in ("\x1b", "Traceback", "DeprecationWarning"):
        assert text not in done.stderr + done.stdout


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ctrl_c_ends_a_simulation(tmp_path: Path) -> None:
    """Its engine has threads that wait for clients which are gone by then."""
    command = [sys.executable, "-m", "server.federate", "arm=dense", *SMALL, "federation.rounds=50"]
    with (tmp_path / "log").open("wb") as log:
        run = subprocess.Popen(
            [*command, "--output", str(tmp_path / "run")],
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
        )
    deadline = time.monotonic() + 200
    while "round_finished" not in read_text_if_there(tmp_path / "run" / "events.jsonl"):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 1
    assert f"stopped; `python -m server.federate resume={tmp_path / 'run'}` goes on" in (tmp_path / "log").read_text()
    assert read_status(tmp_path / "run").state == "stopped"


def test_a_run_in_one_process_sends_what_every_other_engine_sends(tmp_path: Path) -> None:
    """Beside a run in the tests' own grid, which answers at once and in another order."""
    few = [*SMALL, "federation.num_clients=3", "federation.clients_per_round=2", "run_id=same"]
    said = run_module("server.federate", "backend=inprocess", "--output", str(tmp_path / "run"), *few)
    run = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "held-out loss" in said
    settings = Settings.from_json(json.dumps(run["settings"]))
    settings.output = str(tmp_path / "other")
    grid = InProcessGrid(client_app, 3, {"memory": str(tmp_path / "memory")})
    other = run_federation(grid, settings)
    assert [up["payload_digest"] for up in run["uplinks"]] == [up.payload_digest for up in other.uplinks]
    assert run["heldout_loss"] == other.heldout_loss
    assert read_status(tmp_path / "run").state == "finished"


def read_text_if_there(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


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
