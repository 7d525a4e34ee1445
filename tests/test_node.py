"""A node's console, its health check, and its local ports."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from conftest import RunProgram

import client.health
from client.console import CONNECTED, STARTING, WAITING, PartitionConsole, note, round_line, write_notes
from client.health import STALE_SECONDS, problems_of, write_health
from client.node import NodeConfig, PartitionConfig, PartitionPrograms, explanation, free_ports, programs_of
from client.work import Trained
from conf.processes import Child, end_all

SUPERNODE = """\
INFO 2026-01-31 12:00:00,000:      Starting Flower SuperNode
WARNING 2026-01-31 12:00:01,000:   Connection attempt failed, retrying in 0.25 seconds
WARNING 2026-01-31 12:00:02,000:   Connection attempt failed, retrying in 1.00 seconds
INFO 2026-01-31 12:00:03,000:      Connection successful after 2.00 seconds and 3 tries.
INFO 2026-01-31 12:00:03,100:      SuperNode ID: 1234567
INFO 2026-01-31 12:00:09,000:      [RUN 1]
WARNING 2026-01-31 12:01:00,000:   Connection attempt failed, retrying in 0.25 seconds
INFO 2026-01-31 12:01:05,000:      Connection successful after 5.00 seconds and 2 tries.
"""


def test_a_console_says_what_happens_once_and_nothing_else(tmp_path: Path) -> None:
    supernode, trainer = tmp_path / "supernode-3.log", tmp_path / "trainer-3.log"
    trainer.write_text("2026-01-31T11:00:00Z node: round 9: of an earlier start\n")
    said: list[str] = []
    console = PartitionConsole(3, [supernode, trainer], said.append)
    states = [console.state]
    for line in SUPERNODE.splitlines(keepends=True):
        with supernode.open("a") as log:
            log.write(line[:20])
        console.poll()  # half a line is none
        with supernode.open("a") as log:
            log.write(line[20:])
        console.poll()
        states.append(console.state)
    with trainer.open("a") as log:
        log.write("a library's own words\n2026-01-31T12:02:00Z node: round 1: loss 2.5\n")
    console.poll()
    console.poll()
    assert said == [
        "partition 3: waiting for the server",
        "partition 3: the server answers again",
        "partition 3: connected as node 1234567",
        "partition 3: waiting for the server",
        "partition 3: the server answers again",
        "partition 3: round 1: loss 2.5",
    ]
    assert states[1:] == [STARTING, WAITING, WAITING, STARTING, CONNECTED, CONNECTED, WAITING, CONNECTED]


def test_notes_have_times_and_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    note("nobody asked for it")
    write_notes()
    note("round 1:\nloss \x1b[31m2.5")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ node: round 1: loss \[31m2\.5", lines[0])


def test_a_round_is_told_with_loss_seconds_and_bytes() -> None:
    coded = Trained(None, b"x" * 3036, 8, 2.34567, 12.34, 0.56)
    assert round_line(3, coded) == "round 3: loss 2.3457, 12.3 s training, 0.6 s encoding, 3,036 bytes to send"
    dense = Trained({"a": np.zeros((10, 25), np.float32)}, None, 8, 2.0, 1.0, 0.0)
    assert round_line(1, dense).endswith("1,000 bytes to send")


def partition(number: int, port: int, trainer: Path | None, folder: Path) -> PartitionPrograms:
    console = PartitionConsole(number, [], print)
    return PartitionPrograms(number, port, trainer, [], console)


def test_a_node_is_well_while_its_programs_answer(tmp_path: Path, run_program: RunProgram) -> None:
    trainer = tmp_path / "trainer.sock"
    with socket.create_server(("127.0.0.1", 0)) as supernode, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(trainer))
        listener.listen()
        port = supernode.getsockname()[1]
        write_health(tmp_path, [partition(0, port, trainer, tmp_path), partition(1, port, None, tmp_path)])
        assert run_program(client.health.main, [str(tmp_path)]) == (
            0,
            "partition 0: starting; partition 1: starting\n",
            "",
        )
        listener.close()
        assert run_program(client.health.main, [str(tmp_path)])[0] == 1
        assert problems_of(tmp_path) == [f"partition 0: its trainer does not answer at {trainer}"]
    assert f"partition 1: its SuperNode does not answer at port {port}" in problems_of(tmp_path)


def test_a_node_that_is_gone_is_not_well(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as supernode:
        write_health(tmp_path, [partition(0, supernode.getsockname()[1], None, tmp_path)])
        assert problems_of(tmp_path) == []
        content = json.loads((tmp_path / "health.json").read_text())
        content["written"] = time.time() - STALE_SECONDS - 10
        (tmp_path / "health.json").write_text(json.dumps(content))
        assert problems_of(tmp_path) == [f"the node was last seen {STALE_SECONDS + 10:.0f} s ago"]
    assert "no node runs" in problems_of(tmp_path / "nowhere")[0]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"written": "x"}', '{"written": 1e18, "partitions": {"0": 1}}'])
def test_a_damaged_health_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "health.json").write_text(text)
    (problem,) = problems_of(tmp_path)
    assert "health.json is damaged" in problem


def test_the_next_free_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        found = free_ports(taken, 2)
        assert taken not in found
        assert found[0] > taken
        assert len(set(found)) == 2
    with pytest.raises(ValueError, match="--port 65535: 2 free ports are needed"):
        free_ports(65535, 2)


def test_each_partition_has_its_own_programs(tmp_path: Path) -> None:
    node = NodeConfig("x:1", 4, {"memory": tmp_path / "memory"}, tmp_path, tmp_path, tmp_path / "ca.crt")
    for trust_server_code, program in ((False, "client.executor"), (True, "flower-superexec")):
        config = NodeConfig(**{**node.__dict__, "trust_server_code": trust_server_code})
        trainer, supernode, executor = programs_of(config, PartitionConfig(2, 9100, "1", tmp_path / "node-2")).children
        assert [child.environment["CUDA_VISIBLE_DEVICES"] for child in (trainer, supernode, executor)] == ["1"] * 3
        assert program in executor.command
        assert "127.0.0.1:9100" in executor.command
        assert {str(tmp_path / "ca.crt"), str(tmp_path / "node-2"), "9100"} <= set(supernode.command)
        told = supernode.command[supernode.command.index("--node-config") + 1]
        assert told.startswith("partition-id=2 num-partitions=4 ")
        assert f'memory="{tmp_path / "memory"}"' in told
        # other users of the host reach the port between the two, and may not take messages from it
        secret = ["--superexec-auth-secret-file", str(tmp_path / "executor.secret")]
        assert all(" ".join(secret) in " ".join(child.command) for child in (supernode, executor))


def test_why_a_supernode_ended_is_explained(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert explanation(log) == ""
    for text, said in (("... [code: 2004] ...", "the server refuses this key"), ("Address already in use", "its port")):
        log.write_text(text)
        assert said in explanation(log)


def test_what_a_child_writes_is_its_owners_alone(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "echo hello; touch made"]
    child = Child("it", command, tmp_path / "log", dict(os.environ), tmp_path, umask=0o077)
    child.start()
    assert cast("SimpleNamespace", child.process).wait(10) == 0
    end_all([child])
    assert (tmp_path / "log").read_text() == "hello\n"
    assert [(tmp_path / name).stat().st_mode & 0o077 for name in ("log", "made")] == [0, 0]
