"""Recordings: what is saved is loaded; what somebody else wrote is checked before memory is taken for it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import heavy_tailed_update
from safetensors.torch import save_file
from torch import Tensor

from gradcodec.layout import Layout
from gradcodec.training.recording import load_recording, save_recording

A, B = "x.lora_A.weight", "x.lora_B.weight"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "updates.safetensors"


def test_a_recording_is_written_whole_or_not_at_all(path: Path, layout: Layout) -> None:
    save_recording({(1, 0): heavy_tailed_update(0)}, layout.parts, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected torch"):
        save_recording({(1, 0): {"x": object()}}, {}, path)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cannot be written"):
        save_recording({(1, 0): heavy_tailed_update(0)}, {}, path.parent / "nowhere" / "file")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def raw(path: Path, header: str) -> None:
    """A safetensors file of 2 kB, whatever its header says."""
    head = header.encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(max(0, 2048 - len(head))))


@pytest.mark.parametrize(
    "header",
    [
        json.dumps({f"r1/c0/{A}": {"dtype": "F32", "shape": [16384, 16384], "data_offsets": [0, 1 << 30]}}),
        json.dumps({f"r1/c0/{A}": {"dtype": "F32", "shape": [16384, 16384], "data_offsets": [0, 512]}}),
        json.dumps({f"r1/c0/{A}": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 16]}}),
        json.dumps({"__metadata__": {"parts": 3}}),
        "[" * 100_000,
        '{"a":' * 50_000,
        "",
        "null",
    ],
)
def test_a_header_that_says_what_the_file_does_not_hold_is_refused(path: Path, header: str) -> None:
    raw(path, header)
    with pytest.raises(ValueError, match=str(path)):
        load_recording(path)


def one() -> dict[str, Tensor]:
    return {f"r{r}/c0/{name}": torch.ones(shape) for r in (1, 2) for name, shape in {A: (2, 8), B: (6, 2)}.items()}


@pytest.mark.parametrize(
    ("changed", "value", "said"),
    [
        (f"r2/c0/{A}", torch.ones(2, 9), "has shape"),
        (f"r2/c0/{A}", torch.ones(2, 8, dtype=torch.int32), "of type I32"),
        (f"r2/c0/{A}", torch.ones(2, 8, dtype=torch.bool), "of type BOOL"),
        (f"r2/c0/{A}", torch.full((2, 8), torch.nan), "holds NaN"),
        (f"r2/c0/{A}", torch.full((2, 8), 1e300, dtype=torch.float64), "infinity"),
        (f"r2/c0/{A}", None, f"round 2, client 0 lacks tensor '{A}'"),
        ("r2/c1/y", torch.ones(2, 8), "lacks tensor"),
        ("r2/x", torch.ones(2, 8), "is expected"),
        ("r9999999999999/c0/y", torch.ones(2, 8), "is expected"),
        (f"r2/c0/{A}", torch.ones(16), "has shape"),
    ],
)
def test_updates_that_are_not_alike_or_not_finite_are_refused(
    path: Path, changed: str, value: Tensor | None, said: str
) -> None:
    tensors = one() | ({changed: value} if value is not None else {})
    if value is None:
        del tensors[changed]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=said) as error:
        load_recording(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "parts",
    [
        json.dumps({B: {"q": [[0, 1 << 62, 1]]}}),
        json.dumps({B: {"q": [[0, 1 << 200, 1]]}}),
        json.dumps({B: {"q": [[-6, 0, 1]]}}),
        json.dumps({B: {"q": [[0, 3, 1]], "k": [[0, 3, 1]]}}),
        json.dumps({B: {"q": [[0, 6, 0]]}}),
        json.dumps({B: {"q": ["abc"]}}),
        json.dumps({B: [[0, 6, 1]]}),
        json.dumps([B]),
        "[" * 100_000,
        "{",
    ],
)
def test_parts_of_fused_tensors_are_bounded_before_they_are_listed(path: Path, parts: str) -> None:
    save_file(one(), path, {"parts": parts})
    with pytest.raises(ValueError, match=str(path)):
        load_recording(path)


def test_small_files_take_no_large_matrix(path: Path) -> None:
    """Blocks lie side by side in a matrix of the highest rank: one square tensor and one long one would fill 108 MB."""
    tensors = {"r1/c0/a": torch.ones(300, 300), "r1/c0/b": torch.ones(1, 90_000)}
    save_file({key: tensor.half() for key, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match="more than 64 times their size"):
        load_recording(path)
