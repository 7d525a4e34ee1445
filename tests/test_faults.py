"""The fault table: real processes killed in a real deployment over gRPC, TLS and node keys.

Every run is compared with the undisturbed one: rounds lost, and the final held-out loss beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bench.deployment import Deployment, deployment, free_ports, node_command
from server.records.alive import is_alive
from server.records.events import read_status

pytestmark = [pytest.mark.grpc, pytest.mark.timeout(900)]
ROUNDS = 5
SMALL = [
    f"federation.rounds={ROUNDS}",
    "federation.num_clients=2",
    "federation.clients_per_round=2",
    "federation.round_seconds=150",
    "codec.down_bits=0.5",
    "train.steps=4",
    "train.batch_size=8",
    "train.micro_batch_size=8",
    "task.window=64",
    "task.max_windows=200",
    "task.heldout_windows=4",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("deploy") / "server", 2) as running:
        yield running


class Run:
    """``python -m server.federate`` on the deployment, as a process of its own."""

    def __init__(self, place: Deployment, output: Path, *overrides: str, prefix: Sequence[str] = ()) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        where = ["backend=superlink", f"hydra.run.dir={output}"]
        where += [] if any(o.startswith("resume=") for o in overrides) else [*SMALL, f"output={output}"]
        self._log = output / "run.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "server.federate", *where, *overrides],
                env={**os.environ, "FLWR_HOME": str(place.flwr_home)},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background
            )

    def wait_for(self, event: str, server_round: int, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        path = self.output / "events.jsonl"
        while time.monotonic() < deadline:
            entries = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            if any(e["event"] == event and e.get("server_round") == server_round for e in entries):
                return
            assert self.process.poll() is None, self._log.read_text()[-2000:]
            time.sleep(0.05)
        raise AssertionError(f"no {event} of round {server_round}; {self._log.read_text()[-2000:]}")

    def losses(self, seconds: float = 500) -> list[float]:
        assert self.process.wait(seconds) == 0, self._log.read_text()[-3000:]
        losses: list[float] = json.loads((self.output / "results.json").read_text())["heldout_loss"]
        return losses


@pytest.fixture(scope="module")
def undisturbed(place: Deployment, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return Run(place, tmp_path_factory.mktemp("undisturbed")).losses()


def child(process: subprocess.Popen[bytes], word: str) -> psutil.Process:
    """The descendant whose command line holds the word, once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for one in psutil.Process(process.pid).children(recursive=True):
            try:
                if any(word in part for part in one.cmdline()):
                    return one
            except psutil.Error:
                continue
        time.sleep(0.02)
    raise AssertionError(f"no child {word}")


def kill_superlink(place: Deployment) -> None:
    child(place.server, "server.host.control").kill()


def kill_executor_and_app(place: Deployment) -> None:
    child(place.server, "flower-superexec").kill()


def kill_trainer(place: Deployment) -> None:
    child(place.nodes[0], "client.resident").kill()


def kill_client_app(place: Deployment) -> None:
    """That of this round: the one before may still be on its way out."""
    asked, deadline = time.time(), time.monotonic() + 60
    while (process := child(place.nodes[0], "client.own_app")).create_time() < asked:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()


def cut_network(place: Deployment) -> None:
    """For so long that Flower cannot count the node as gone, which it does 60 s after the last heartbeat."""
    place.relays[0].cut(10)


def test_faults_that_cost_nothing(place: Deployment, undisturbed: list[float], tmp_path: Path) -> None:
    """One a round, in the last the end of the server app, after which the run is resumed: the losses are those of the
    undisturbed run, to the bit."""
    run = Run(place, tmp_path)
    for server_round, fault in enumerate((kill_superlink, kill_trainer, kill_client_app, cut_network), start=1):
        run.wait_for("round_started", server_round)
        fault(place)
    run.wait_for("round_started", ROUNDS)
    kill_executor_and_app(place)
    assert run.process.wait(300) != 0
    losses, status = Run(place, tmp_path, f"resume={tmp_path}").losses(), read_status(tmp_path)
    assert status.faults == 0, status.last_fault
    assert losses == undisturbed


def test_faults_that_cost_replies_and_no_round(place: Deployment, undisturbed: list[float], tmp_path: Path) -> None:
    """A node's disk is full for a round, later its SuperNode is killed. What was kept stays, and the rounds go on
    without the client until the server takes it back."""
    (tried := tmp_path / "tried").mkdir()
    with a_full_disk(tried):  # skips where that cannot be done
        pass
    run = Run(place, tmp_path / "run")
    run.wait_for("round_finished", 1)
    with a_full_disk(place.folder / "memory-0"):
        run.wait_for("fault", 2)
    run.wait_for("round_started", 3)
    in_round_2 = read_status(run.output)
    child(place.nodes[0], "client.supernode").kill()
    losses, status = run.losses(), read_status(run.output)
    assert in_round_2.faults == 1
    assert "No space left" in in_round_2.last_fault
    assert len(losses) == len(undisturbed)
    assert losses[:2] == undisturbed[:2]
    assert losses[-1] == pytest.approx(undisturbed[-1], abs=0.2)  # one client alone learns nearly as much here
    assert 2 <= status.faults <= ROUNDS
    assert status.uplinks == 2 * ROUNDS - status.faults
    print(f"{status.faults} of {2 * ROUNDS} replies lost: held-out loss {losses[-1]:.4f} beside {undisturbed[-1]:.4f}")


@contextlib.contextmanager
def a_full_disk(folder: Path) -> Iterator[None]:
    """A file system of one page lies over the folder."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_ctrl_c_stops_the_run_at_the_superlink(place: Deployment, tmp_path: Path) -> None:
    run = Run(place, tmp_path)
    run.wait_for("round_finished", 1)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(120) == 1
    assert re.search(r"run \d+ is stopped; .*resume=", (tmp_path / "run.log").read_text())
    assert read_status(tmp_path).state == "stopped"
    assert not is_alive(tmp_path)
    status = [sys.executable, "-m", "server", "status", str(tmp_path)]
    assert "stopped" in subprocess.run(status, capture_output=True, text=True).stdout


def test_nodes_that_may_not_join_are_told_why(place: Deployment, tmp_path: Path) -> None:
    keys = [sys.executable, "-m", "server", "keys"]
    other = tmp_path / "other"
    subprocess.run([*keys, "--folder", str(other), "--nodes", "1"], check=True, capture_output=True)
    subprocess.run([*keys, "--folder", str(place.folder), "--nodes", "3"], check=True, capture_output=True)
    address = f"127.0.0.1:{place.fleet_port}"

    def told(partition: int, *options: str) -> str:
        command = [*node_command(place.folder, partition, 3, address, free_ports(1)[0]), "--no-trainer", *options]
        start, logs = time.monotonic(), tmp_path / f"logs-{uuid.uuid4().hex}"
        done = subprocess.run([*command, "--logs", str(logs)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stderr
        print(f"refused after {time.monotonic() - start:.1f} s: {done.stderr.splitlines()[-1][:100]}")
        return done.stderr

    with ThreadPoolExecutor() as pool:  # each waits for its server most of the time
        foreign = pool.submit(told, 0, "--ca", str(other / "ca.crt"))
        bare = pool.submit(told, 0, "--insecure")
        unknown = pool.submit(told, 2)
        twice = pool.submit(told, 0)
    assert "is not from the CA of" in foreign.result()
    assert "wants TLS" in bare.result()
    assert "is not registered or was revoked" in unknown.result()
    assert "another SuperNode uses it" in twice.result()
    register = [sys.executable, "-m", "server", "register", "--folder", str(place.folder)]
    subprocess.run([*register, str(place.folder / "node-2.pub")], check=True, capture_output=True)
    revoke = [sys.executable, "-m", "server", "revoke", "--folder", str(place.folder)]
    done = subprocess.run([*revoke, str(place.folder / "node-2.pub")], check=True, capture_output=True, text=True)
    assert "is out" in done.stdout
    assert "is not registered or was revoked" in told(2)
    assert (place.folder / "node-2.pub.revoked").is_file()


def test_the_server_ends_all_that_it_started(place: Deployment) -> None:
    """The last test of this deployment."""
    descendants = psutil.Process(place.server.pid).children(recursive=True)
    descendants += psutil.Process(place.nodes[0].pid).children(recursive=True)
    place.server.send_signal(signal.SIGTERM)
    assert place.server.wait(40) == 0
    place.nodes[0].send_signal(signal.SIGTERM)
    assert place.nodes[0].wait(40) == 0
    _, alive = psutil.wait_procs(descendants, timeout=20)
    assert not alive
