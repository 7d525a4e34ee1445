from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from client.memory import load_residual, save_residual
from gradcodec.exchange import Residual
from gradcodec.layout import Layout


@pytest.fixture
def residual(layout: Layout) -> Residual:
    target = torch.randn(layout.rank, layout.num_columns, generator=torch.Generator().manual_seed(0))
    return Residual(target, target / 3, "0123456789abcdef")


def test_what_is_kept_comes_back(tmp_path: Path, layout: Layout, residual: Residual) -> None:
    save_residual(tmp_path / "run", 3, layout, residual)
    loaded = load_residual(tmp_path / "run", 3, layout)
    assert loaded is not None
    assert torch.equal(loaded.target_RC, residual.target_RC)
    assert torch.equal(loaded.left_RC, residual.left_RC)
    assert loaded.payload_digest == residual.payload_digest
    assert load_residual(tmp_path / "run", 4, layout) is None
    assert load_residual(tmp_path / "another-run", 3, layout) is None
    assert len(list((tmp_path / "run").iterdir())) == 1  # no half-written file is left


def test_a_damaged_residual_is_dropped_with_a_warning(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    save_residual(tmp_path, 0, layout, residual)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, layout) is None
    assert "cannot be read" in caplog.text


def test_a_residual_of_another_adapter_is_dropped_with_a_warning(
    tmp_path: Path, layout: Layout, residual: Residual, caplog: pytest.LogCaptureFixture
) -> None:
    save_residual(tmp_path, 0, layout, residual)
    with caplog.at_level(logging.WARNING):
        assert load_residual(tmp_path, 0, Layout.of({"x.lora_A.weight": (8, 64)})) is None
    assert "another model or adapter" in caplog.text
