"""Secure aggregation in a real deployment: nodes killed at each step of the protocol."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.drop_outs import STEPS, drop_outs

pytestmark = [pytest.mark.grpc, pytest.mark.timeout(1200)]


def test_a_node_of_four_is_killed_at_each_step(tmp_path: Path) -> None:
    """One of four: 25 %. ``python -m bench.drop_outs`` does it with three of ten."""
    found = drop_outs(tmp_path, nodes=4, gone=1)
    assert list(found) == list(STEPS)
    assert {step: one["survived"] for step, one in found.items()} == dict.fromkeys(STEPS, True), found
