"""A node sends what its line takes in the seconds that its owner gives, as the reply before was measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import InProcessGrid
from flwr.app import UserConfig
from test_federation import run, settings_for

from client.app import app as client_app
from client.console import NOTE, PartitionConsole
from client.line import LEAST_BITS, Line, Meter, read_speed, write_speed
from client.work import LINE, UPLOAD_SECONDS
from server.run.federation import run_federation


def test_the_logs_tell_how_fast_the_line_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("client.console.time.monotonic", lambda: clock[0])
    trainer, supernode, speed = tmp_path / "trainer.log", tmp_path / "supernode.log", tmp_path / "line.json"
    said: list[str] = []
    console = PartitionConsole(0, [trainer, supernode], said.append, Meter(speed))

    def log(path: Path, line: str, seconds: float) -> None:
        with path.open("a") as file:
            file.write(line + "\n")
        clock[0] += seconds
        console.poll()

    log(supernode, "INFO :      Sent successfully", 1.0)  # a roll call's: nothing that was measured
    assert read_speed(speed) is None
    made = f"2026-11-29T06:00:00Z{NOTE}round 1: loss 3.1, 0.8 s training, 0.7 s encoding, 24,000 bytes to send"
    log(trainer, made, 1.0)
    log(supernode, "INFO :      Sending: train message (ID: abc)", 1.0)
    log(supernode, "INFO :      Sent successfully", 12.0)
    assert read_speed(speed) == pytest.approx(2000.0)
    log(supernode, "INFO :      Sending: query message (ID: abd)", 1.0)
    log(supernode, "INFO :      Sent successfully", 90.0)
    assert read_speed(speed) == pytest.approx(2000.0)


def test_bits_go_by_the_speed_and_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    line = Line(tmp_path / "line.json", 5.0)
    assert line.most_bits(80_000) is None
    write_speed(line.file, 2000.0)
    assert line.most_bits(80_000) == pytest.approx(1.0)
    write_speed(line.file, 1.0)
    assert line.most_bits(80_000) == LEAST_BITS
    for text in ("", "{", "[]", '{"bytes_a_second": "fast"}', '{"bytes_a_second": null}'):
        line.file.write_text(text)
        assert line.most_bits(80_000) is None
    write_speed(tmp_path / "none" / "line.json", 1.0)  # a folder that is gone costs the measurement alone


def test_a_slow_node_sends_less_than_the_others(tmp_path: Path) -> None:
    class OneSlow(InProcessGrid):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            for partition, context in enumerate(self.contexts.values()):
                file = tmp_path / f"line-{partition}.json"
                write_speed(file, 500.0 if partition == 0 else 1e6)
                own = {LINE: str(file), UPLOAD_SECONDS: "4.0"}
                context.node_config = UserConfig({**context.node_config, **own})

    settings = settings_for(tmp_path, "run", arm="coded")
    settings.codec.bits, settings.codec.down_bits = 1.0, 0.5
    settings.federation.clients_per_round, settings.federation.sample_answers = 3, 0
    results = run(settings, tmp_path, OneSlow)
    assert not results.faults
    for uplink in results.uplinks:
        most = 4 * 500 if uplink.partition == 0 else results.num_parameters / 8
        assert 0.9 * most < uplink.payload_bytes <= most


def test_a_run_of_one_rate_says_that_it_cannot_have_such_a_node(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, "run", arm="dense")
    own = {LINE: str(tmp_path / "line.json"), UPLOAD_SECONDS: "4.0", "memory": str(tmp_path)}
    grid = InProcessGrid(client_app, settings.federation.num_clients, own)
    with pytest.raises(ValueError, match=r"in 4.0 s \(--upload-seconds\), and the run sends adapters as they are"):
        run_federation(grid, settings)


@pytest.mark.parametrize("options", [("--upload-seconds", "0.5"), ("--max-rank", "0"), ("--max-bits", "nan")])
def test_what_is_no_bound_is_refused(options: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "client", "--server", "x:1", "--partition", "0", "--partitions", "1", "--insecure"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and f"{options[0]} {options[1]} must be" in ended.stderr
