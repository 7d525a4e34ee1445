"""The resident trainer: the same answers as in-process, frames that cannot be abused, and its death survived."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_federation import settings_for

from client.link import ResidentTrainer, receive, send, trainer_at
from client.trainer import Trainer, trainer_for
from client.work import Work
from conf.schema import Settings
from server.evaluate import Evaluator


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("sockets") / "private" / "trainer.sock"
    process = start(place)
    yield place
    process.terminate()
    assert process.wait(20) == 0
    assert not place.exists()


def start(place: Path, *launcher: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", *launcher, "client.resident", "--socket", str(place)])
    deadline = time.monotonic() + 90
    while not place.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_for(tmp_path_factory.mktemp("resident"), "run", codec__name="rotated")


def test_its_answers_are_those_of_a_trainer_in_this_process(path: Path, settings: Settings, tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in Evaluator(settings).initial.items()}
    text = settings.to_json()
    resident, here = trainer_at(path, text, ()), trainer_for(text, ())
    assert isinstance(resident, ResidentTrainer)
    resident.check(0)
    for server_round in (1, 2):
        answers = [
            trainer.train(Work(arrays, None, 0, server_round, "", tmp_path / name))
            for name, trainer in (("resident", resident), ("here", here))
        ]
        assert answers[0].payload == answers[1].payload is not None
        assert answers[0].train_loss == answers[1].train_loss
    settings.arm = "dense"
    text = settings.to_json()
    dense = [trainer_at(place, text, ()).train(Work(arrays, None, 1, 1, "", tmp_path)) for place in (path, None)]
    settings.arm = "coded"
    assert dense[0].adapter is not None
    assert dense[1].adapter is not None
    assert list(dense[0].adapter) == list(dense[1].adapter)
    assert all(np.array_equal(dense[0].adapter[name], array) for name, array in dense[1].adapter.items())


def test_a_team_of_two_gives_the_update_of_one(settings: Settings, tmp_path: Path) -> None:
    """Data parallel: each process takes every other micro-batch, and gradients are added up."""
    settings = dataclasses.replace(settings, arm="dense", train=dataclasses.replace(settings.train, micro_batch_size=1))
    place, text = tmp_path / "team" / "trainer.sock", settings.to_json()
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    team = start(place, *torchrun)
    try:
        arrays = {name: tensor.numpy() for name, tensor in Evaluator(settings).initial.items()}
        work = Work(arrays, None, 0, 1, "", tmp_path)
        trainer_at(place, text, ()).check(0)
        with pytest.raises(ValueError, match="/nowhere"):  # and the others wait for the next message
            trainer_at(place, text, (("model-path", "/nowhere"),)).check(0)
        together, alone = (trainer_at(where, text, ()).train(work) for where in (place, None))
    finally:
        team.terminate()
        team.wait(30)
    assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-5)
    assert together.adapter is not None
    assert alone.adapter is not None
    moved = [alone.adapter[name] - arrays[name] for name in arrays]
    apart = [together.adapter[name] - alone.adapter[name] for name in arrays]
    assert sum(np.abs(a).sum() for a in apart) < 1e-2 * sum(np.abs(m).sum() for m in moved)


def test_a_refusal_comes_back_as_one(path: Path, settings: Settings) -> None:
    with pytest.raises(ValueError, match="/nowhere"):
        trainer_at(path, settings.to_json(), (("model-path", "/nowhere"),)).check(0)


def test_only_its_owner_can_reach_it(path: Path) -> None:
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("frame", [b"", b"abc", struct.pack("<QQ", 1 << 62, 0), struct.pack("<QQ", 4, 0) + b"[[[["])
def test_it_survives_what_is_no_frame(path: Path, settings: Settings, frame: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(frame)
    trainer_at(path, settings.to_json(), ()).check(0)


def test_frames_come_back() -> None:
    one, other = socket.socketpair()
    body = os.urandom(3_000_000)
    with one, other:
        sender = threading.Thread(target=send, args=(one, {"verb": "x", "n": 1}, body))
        sender.start()
        assert receive(other) == ({"verb": "x", "n": 1}, body)
        sender.join()


def test_without_one_the_work_is_done_here(tmp_path: Path, settings: Settings) -> None:
    assert isinstance(trainer_at(tmp_path / "none.sock", settings.to_json(), ()), Trainer)


def test_a_trainer_that_is_killed_is_asked_again_when_it_is_back(tmp_path: Path, settings: Settings) -> None:
    place = tmp_path / "trainer.sock"
    first = start(place)
    arrays = {name: tensor.numpy() for name, tensor in Evaluator(settings).initial.items()}
    found: list[bytes | None] = []

    def ask() -> None:
        trainer = ResidentTrainer(place, settings.to_json(), ())
        done = trainer.train(Work(arrays, None, 2, 1, "", tmp_path / "memory"))
        found.append(done.payload)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.5)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start_again(place)
    asking.join(120)
    second.terminate()
    second.wait(20)
    here = trainer_for(settings.to_json(), ()).train(Work(arrays, None, 2, 1, "", tmp_path / "here"))
    assert found == [here.payload]


def start_again(place: Path) -> subprocess.Popen[bytes]:
    place.unlink(missing_ok=True)
    return start(place)
