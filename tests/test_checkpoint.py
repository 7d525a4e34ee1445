"""The checkpoint file: what is damaged or made up is refused, and the last good one is never lost."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from conf.output import OutputError
from conf.schema import Settings
from gradcodec.state import State
from server.records.results import NodeRefusal, RunResults
from server.run.checkpoint import NAME, PREVIOUS, Checkpoint, go_back, load_checkpoint, save_checkpoint
from strategies.outcomes import Fault, Uplink


def checkpoint_of(server_round: int) -> Checkpoint:
    settings = Settings(run_id="run")
    uplinks = [Uplink(r, 0, 100, "digest", 1.5, 0.1, 0.01, 2.0) for r in range(1, server_round + 1)]
    results = RunResults(settings, 40, [4.0 - r for r in range(server_round + 1)], uplinks, [Fault(1, 1, "why")], 1.0)
    results.refused_nodes = [NodeRefusal(7, "claims partition 0")]
    state = State({"sampling": {"failures": [[1, 2]], "resting": []}}, {"optimizer/m": torch.ones(3)})
    return Checkpoint(settings, server_round, {"a": torch.full((2, 3), float(server_round))}, results, state)


def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    saved = checkpoint_of(2)
    save_checkpoint(saved, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.settings == saved.settings
    assert loaded.results == saved.results
    assert loaded.strategy.values == saved.strategy.values
    assert torch.equal(loaded.adapter["a"], saved.adapter["a"])
    assert torch.equal(loaded.strategy.tensors["optimizer/m"], torch.ones(3))


def test_300_flipped_bits_are_refused_or_harmless(tmp_path: Path) -> None:
    save_checkpoint(checkpoint_of(2), tmp_path)
    path = tmp_path / NAME
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    bits = [draw.randrange(8 * len(whole)) for _ in range(200)]
    bits += [draw.randrange(8 * 600) for _ in range(100)]  # the head, which is small beside the rest
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(tmp_path)
        except ValueError:
            refused += 1
            continue
        assert loaded.results == checkpoint_of(2).results
        assert torch.equal(loaded.adapter["a"], checkpoint_of(2).adapter["a"])
    assert refused > 280


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    save_checkpoint(checkpoint_of(1), tmp_path)
    content = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(content[:length])
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("server_round",), "2"),
        (("server_round",), 7),
        (("strategy",), []),
        (("results", "heldout_loss"), ["low", 1, 2]),
        (("results", "uplinks"), [{"server_round": 1}]),
        (("results", "faults"), [{"server_round": 1, "partition": 0, "reason": 5}]),
        (("results", "uplinks"), 3),
        (("results",), None),
        (("settings",), "[" * 100_000),
    ],
)
def test_a_made_up_state_with_a_right_digest_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...], value: Any
) -> None:
    real = json.dumps

    def changed(content: Any, **how: Any) -> str:
        if isinstance(content, dict) and "results" in content:
            holder = content
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
        return real(content, **how)

    monkeypatch.setattr("server.run.checkpoint.json.dumps", changed)
    save_checkpoint(checkpoint_of(2), tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path)


def test_an_adapter_of_nan_is_refused(tmp_path: Path) -> None:
    broken = checkpoint_of(1)
    broken.adapter["a"][0, 0] = float("nan")
    save_checkpoint(broken, tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        load_checkpoint(tmp_path)


def test_the_last_two_are_kept_and_from_round_chooses(tmp_path: Path) -> None:
    for server_round in (1, 2, 3):
        save_checkpoint(checkpoint_of(server_round), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NAME]
    assert load_checkpoint(tmp_path).server_round == 3
    assert load_checkpoint(tmp_path, 2).server_round == 2
    with pytest.raises(ValueError, match=r"from_round=1: checkpoints are kept of rounds \[2, 3\]"):
        load_checkpoint(tmp_path, 1)
    go_back(tmp_path, 3)
    assert load_checkpoint(tmp_path).server_round == 3
    go_back(tmp_path, 2)
    assert load_checkpoint(tmp_path).server_round == 2


def test_a_damaged_one_names_the_one_before_it(tmp_path: Path) -> None:
    for server_round in (1, 2):
        save_checkpoint(checkpoint_of(server_round), tmp_path)
    (tmp_path / NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=PREVIOUS):
        load_checkpoint(tmp_path)
    (tmp_path / NAME).unlink()
    assert load_checkpoint(tmp_path).server_round == 1


def test_a_full_disk_is_named_and_costs_nothing_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for server_round in (1, 2):
        save_checkpoint(checkpoint_of(server_round), tmp_path)

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("server.run.checkpoint.save_file", full)
    with pytest.raises(OutputError, match=r"cannot be written: .*No space left"):
        save_checkpoint(checkpoint_of(3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NAME]
    assert (load_checkpoint(tmp_path).server_round, load_checkpoint(tmp_path, 1).server_round) == (2, 1)
