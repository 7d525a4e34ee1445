from __future__ import annotations

import json
import logging
import os
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from client.residuals import load_residual, save_residual
from conf.output import OutputError
from gradcodec.exchange import Residual
from gradcodec.layout import Layout


@pytest.fixture
def residual(layout: Layout) -> Residual:
    target = torch.randn(layout.rank, layout.num_columns, generator=torch.Generator().manual_seed(0))
    return Residual(target, target / 3, "0123456789abcdef")


def test_what_is_kept_comes_back(tmp_path: Path, layout: Layout, residual: Residual) -> None:
    save_residual(tmp_path / "run", 3, layout, 1, residual)
    loaded = load_residual(tmp_path / "run", 3, layout, 2)
    assert loaded is not None
    assert torch.equal(loaded.target_RC, residual.target_RC)
    assert torch.equal(loaded.error_RC, residual.error_RC)
    assert loaded.payload_digest == residual.payload_digest
    assert load_residual(tmp_path / "run", 4, layout, 2) is None
    assert load_residual(tmp_path / "another-run", 3, layout, 2) is None
    assert len(list((tmp_path / "run").iterdir())) == 1  # no half-written file is left


def test_a_damaged_residual_is_dropped_with_a_warning(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    save_residual(tmp_path, 0, layout, 1, residual)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, layout, 2) is None
    assert "cannot be read" in caplog.text


def test_a_residual_of_another_adapter_is_dropped_with_a_warning(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    save_residual(tmp_path, 0, layout, 1, residual)
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, Layout.of({"x.lora_A.weight": (8, 64)}), 2) is None
    assert "another model or adapter" in caplog.text


def test_a_flipped_bit_is_noticed(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    save_residual(tmp_path, 0, layout, 1, residual)
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, layout, 2) is None
    assert "is damaged" in caplog.text


def test_a_round_that_is_asked_for_again_starts_from_what_the_round_before_left(
    tmp_path: Path, layout: Layout, residual: Residual
) -> None:
    again = Residual(2 * residual.target_RC, residual.error_RC, "second")
    save_residual(tmp_path, 0, layout, 1, residual)
    for _ in range(2):  # a third attempt is no other than the second
        save_residual(tmp_path, 0, layout, 4, again)
        found = load_residual(tmp_path, 0, layout, 4)
        assert found is not None
        assert found.payload_digest == residual.payload_digest
    found = load_residual(tmp_path, 0, layout, 5)
    assert found is not None
    assert found.payload_digest == "second"


def test_a_round_further_back_than_what_is_kept_begins_anew_and_says_so(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    save_residual(tmp_path, 0, layout, 1, residual)
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, layout, 1) is None  # nothing was before the client's first round
        assert not caplog.text
        for server_round in (2, 3, 4):
            save_residual(tmp_path, 0, layout, server_round, residual)
        assert load_residual(tmp_path, 0, layout, 2) is None
    assert "nothing of the residual from before round 3 is kept any more, and round 2 is asked for again" in caplog.text


def test_a_client_that_is_killed_while_it_writes_loses_nothing(
    tmp_path: Path, layout: Layout, residual: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = Residual(2 * residual.target_RC, residual.error_RC, "second")
    last, before = tmp_path / "partition-0.safetensors", tmp_path / "partition-0.before.safetensors"
    replace = os.replace

    def killed_between(source: Path, target: Path) -> None:
        if target == last:
            raise KeyboardInterrupt
        replace(source, target)

    save_residual(tmp_path, 0, layout, 1, residual)
    with monkeypatch.context() as patch:
        patch.setattr("client.generations.os.replace", killed_between)
        with pytest.raises(KeyboardInterrupt):
            save_residual(tmp_path, 0, layout, 2, second)
    assert not last.exists() and before.exists()
    for server_round, digest in ((1, None), (2, residual.payload_digest), (3, residual.payload_digest)):
        found = load_residual(tmp_path, 0, layout, server_round)
        assert (None if found is None else found.payload_digest) == digest
    save_residual(tmp_path, 0, layout, 2, second)
    for server_round, digest in ((2, residual.payload_digest), (3, "second")):
        found = load_residual(tmp_path, 0, layout, server_round)
        assert found is not None
        assert found.payload_digest == digest


def test_what_lies_before_a_damaged_residual_is_not_sent_twice(
    tmp_path: Path, layout: Layout, residual: Residual
) -> None:
    for server_round in (1, 2):
        save_residual(tmp_path, 0, layout, server_round, residual)
    last, before = tmp_path / "partition-0.safetensors", tmp_path / "partition-0.before.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    assert before.exists()
    assert load_residual(tmp_path, 0, layout, 3) is None


def test_what_was_kept_stays_if_the_disk_is_full(
    tmp_path: Path, layout: Layout, residual: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_residual(tmp_path, 0, layout, 1, residual)

    def full(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("client.generations.save_file", full)
    with pytest.raises(OutputError, match=r"partition-0.*No space left"):
        save_residual(tmp_path, 0, layout, 2, residual)
    assert load_residual(tmp_path, 0, layout, 2) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, layout: Layout, residual: Residual) -> None:
    (tmp_path / "memory").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot be written to .*memory/run"):
        save_residual(tmp_path / "memory" / "run", 0, layout, 1, residual)


def test_memory_of_runs_long_ago_is_removed(tmp_path: Path, layout: Layout, residual: Residual) -> None:
    for run in ("old", "young"):
        save_residual(tmp_path / run, 0, layout, 1, residual)
    (tmp_path / "killed").mkdir()
    killed = tmp_path / "killed" / "partition-0.part123"
    killed.write_bytes(b"half")
    old = time.time() - 40 * 86400
    for path in (tmp_path / "old" / "partition-0.safetensors", killed):
        os.utime(path, (old, old))
    save_residual(tmp_path / "new", 0, layout, 1, residual)
    assert {path.name for path in tmp_path.iterdir()} == {"young", "new"}


def test_what_killed_writers_left_goes_with_the_next_round(
    tmp_path: Path, layout: Layout, residual: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    save_residual(tmp_path, 0, layout, 1, residual)
    for name in ("partition-0.part4711", "partition-0.next.part", "partition-1.next.part"):
        (tmp_path / name).write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr("client.generations.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_residual(tmp_path, 0, layout, 2, residual)
    save_residual(tmp_path, 0, layout, 2, residual)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"partition-0.safetensors", "partition-0.before.safetensors", "partition-1.next.part"}


def test_its_owner_alone_can_read_it(tmp_path: Path, layout: Layout, residual: Residual) -> None:
    for server_round in (1, 2):
        save_residual(tmp_path / "run", 0, layout, server_round, residual)
    assert [path.stat().st_mode & 0o077 for path in (tmp_path / "run", *(tmp_path / "run").iterdir())] == [0, 0, 0]


def test_a_file_of_another_size_is_dropped_before_memory_is_taken(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    """A sparse file: eight gigabytes that are no bytes on the disk, under a head that says that it fits."""
    save_residual(tmp_path, 0, layout, 1, residual)
    path = next(tmp_path.iterdir())
    size = 8 << 30
    head = json.dumps(
        {
            "__metadata__": {"layout": layout.id.hex(), "round": "1", "digest": "", "checksum": ""},
            "target": {"dtype": "F32", "shape": [8, size // 32], "data_offsets": [0, size]},
            "error": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
        }
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + size + 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, layout, 2) is None
    assert "another model or adapter" in caplog.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000  # KiB
