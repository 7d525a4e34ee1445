"""The resident trainer: the same answers as in-process, frames that cannot be abused, and its death survived."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_federation import settings_for

from adapters.footprint import MemoryEstimate
from adapters.team import Team
from client.link import ResidentTrainer, receive, send, trainer_at
from client.resident import follow
from client.trainer import Trainer, trainer_for
from client.work import Work
from conf.schema import Settings
from server.run.evaluate import Evaluator


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
    """On a small text of its own: the standard library takes every process seconds to read."""
    folder = tmp_path_factory.mktemp("resident")
    texts = folder / "texts"
    texts.mkdir()
    for i, source in enumerate(sorted(Path("tests").glob("test_[a-d]*.py"))):
        (texts / f"{i}.txt").write_text(source.read_text())
    return settings_for(folder, "run", codec__name="rotated", task__name="text", task__path=str(texts))


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
    asked = Work(arrays, None, 0, 2, "", tmp_path)
    said, own = (dataclasses.replace(trainer.evaluate(asked), seconds=0.0) for trainer in (resident, here))
    assert said == own
    assert (said.windows, said.tokens, said.lacks) == (4, 4 * 31, None)
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


def test_it_survives_what_is_no_frame(path: Path, settings: Settings) -> None:
    for frame in (b"", b"abc", struct.pack("<QQ", 1 << 62, 0), struct.pack("<QQ", 4, 0) + b"[[[["):
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


def answer_one(place: Path, answer: Callable[[socket.socket], object]) -> None:
    """A trainer that lives for one question."""
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        connection, _ = listener.accept()
        with connection:
            receive(connection)
            answer(connection)


def test_a_trainer_that_dies_of_a_message_is_asked_again_when_it_is_back(
    path: Path, settings: Settings, tmp_path: Path
) -> None:
    place = tmp_path / "trainer.sock"
    arrays = {name: tensor.numpy() for name, tensor in Evaluator(settings).initial.items()}
    found: list[bytes | None] = []

    def ask() -> None:
        trainer = ResidentTrainer(place, settings.to_json(), ())
        done = trainer.train(Work(arrays, None, 2, 1, "", tmp_path / "memory"))
        found.append(done.payload)

    asking = threading.Thread(target=ask)
    asking.start()
    answer_one(place, lambda _: None)  # it has the question, and dies
    place.unlink()
    place.symlink_to(path)  # the next one is a real one
    asking.join(120)
    here = trainer_for(settings.to_json(), ()).train(Work(arrays, None, 2, 1, "", tmp_path / "here"))
    assert found == [here.payload]


def test_one_that_dies_late_is_waited_for_as_long_as_one_that_dies_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.link.RESTART_SECONDS", 1.0)
    place = tmp_path / "trainer.sock"

    def live() -> None:
        answer_one(place, lambda _: time.sleep(1.3))  # longer than the client's patience, and then it dies
        place.unlink()
        time.sleep(0.4)
        answer_one(place, lambda connection: send(connection, {}, b""))

    living = threading.Thread(target=live)
    living.start()
    ResidentTrainer(place, "{}", ()).check(0)
    living.join()
    with pytest.raises(ConnectionError, match="no resident trainer at"):
        ResidentTrainer(place, "{}", ()).check(0)


def test_one_that_dies_of_every_question_is_given_up(tmp_path: Path) -> None:
    place = tmp_path / "trainer.sock"

    def die_again_and_again() -> None:
        for _ in range(3):
            answer_one(place, lambda _: None)

    dying = threading.Thread(target=die_again_and_again)
    dying.start()
    with pytest.raises(ConnectionError, match="died 3 times of one message"):
        ResidentTrainer(place, "{}", ()).check(0)
    dying.join()


def test_another_run_keeps_the_model_and_another_model_frees_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[MemoryEstimate] = []
    monkeypatch.setattr("client.trainer.check_fits", lambda estimate, _: checked.append(estimate))
    settings = dataclasses.replace(settings, seed=6, run_id="first")
    first = trainer_for(settings.to_json(), ())
    first.check(0)
    model, tokenizer = first.model, first.tokenizer
    assert trainer_for(settings.to_json(), ()) is first
    with pytest.raises(ValueError, match="/nowhere"):  # changes nothing
        trainer_for(settings.to_json(), (("model-path", "/nowhere"),))
    for run_id, arm in (("second", "coded"), ("third", "dense")):
        another = trainer_for(dataclasses.replace(settings, run_id=run_id, arm=arm).to_json(), ())
        another.check(0)
        assert another is not first
        assert another.model is model and another.tokenizer is tokenizer
    assert [estimate.weights > 0 for estimate in checked] == [True, False, False]
    gone = weakref.ref(model)
    del first, another, model
    trainer_for(dataclasses.replace(settings, seed=7).to_json(), ())
    assert gone() is None  # before anything of the new one is loaded


def test_a_model_whose_files_were_replaced_is_loaded_again(settings: Settings, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(settings.model.path, place)
    own = (("model-path", str(place)),)
    old = trainer_for(dataclasses.replace(settings, run_id="old").to_json(), own).model
    os.utime(place / "model.safetensors", (1, 1))
    assert trainer_for(dataclasses.replace(settings, run_id="new").to_json(), own).model is not old


def test_gradients_of_a_message_that_failed_do_not_count(settings: Settings, tmp_path: Path) -> None:
    trainer = trainer_for(dataclasses.replace(settings, arm="dense").to_json(), ())
    work = Work({name: t.numpy() for name, t in Evaluator(settings).initial.items()}, None, 0, 1, "", tmp_path)
    clean = trainer.train(work).adapter
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    again = trainer.train(work).adapter
    assert clean is not None and again is not None
    assert all(np.array_equal(clean[name], again[name]) for name in clean)


def test_others_of_a_team_hold_no_trainer_between_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Trainer]] = []

    class Small:
        def check(self, partition: int) -> None:
            pass

    def trainer_of(_: object) -> Small:
        gc.collect()
        assert not any(old() for old in made)
        made.append(weakref.ref(trainer := Small()))  # type: ignore[arg-type]
        return trainer

    class Told(Team):
        def told(self) -> bytes:
            if len(made) == 2:
                raise EOFError
            return json.dumps({"verb": "check", "partition": 0}).encode()

    monkeypatch.setattr("client.resident._trainer", trainer_of)
    with pytest.raises(EOFError):
        follow(Told())


def test_what_ships_with_the_project_is_found_in_this_nodes_checkout(settings: Settings, tmp_path: Path) -> None:
    here = Path("assets").absolute()
    there = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, path="/srv/of-the-server/assets/tiny-llama"),
    )
    assert trainer_for(there.to_json(), ()).settings.model.path == str(here / "tiny-llama")
    shutil.copytree(here / "tiny-llama", tmp_path / "assets" / "tiny-llama")
    there.model.path = str(tmp_path / "assets" / "tiny-llama")  # is on this node: taken as it is
    assert trainer_for(there.to_json(), ()).settings.model.path == there.model.path
    there.model.path = "/srv/of-the-server/assets/another"
    with pytest.raises(ValueError, match="of-the-server/assets/another"):
        trainer_for(there.to_json(), ())
