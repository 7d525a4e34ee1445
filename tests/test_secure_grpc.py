"""Secure aggregation in a real deployment: nodes killed at each step of the protocol."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.drop_outs import drop_outs

pytestmark = [pytest.mark.grpc, pytest.mark.timeout(1200)]


def test_a_node_of_four_is_killed(tmp_path: Path) -> None:
    """``python -m bench.drop_outs`` kills three of ten, at every step."""
    steps = "none", "before the reply", "before the opening"
    found = drop_outs(tmp_path, nodes=4, gone=1, steps=steps)
    assert {step: one["survived"] for step, one in found.items()} == dict.fromkeys(steps, True), found
