"""The arm without clients, where it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters.export import load_adapter
from adapters.finetune import DivergedError
from adapters.settings import TrainSettings
from conf.schema import FederationSettings, Settings
from server.run.centralised import run_alone
from tasks.settings import TaskSettings


def test_a_run_that_diverges_says_so_and_keeps_its_last_finite_adapter(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("\n".join([json.dumps({"text": "Every client keeps its text. " * 40})] * 8))
    settings = Settings(
        arm="centralised",
        output=str(tmp_path / "run"),
        task=TaskSettings(name="jsonl", path=str(tmp_path / "texts.jsonl"), window=32, heldout_windows=2),
        train=TrainSettings(update="delta", lr=1e30, steps=2, batch_size=2, micro_batch_size=2),
        federation=FederationSettings(rounds=3, num_clients=2, clients_per_round=1),
    )
    with pytest.raises(
        DivergedError, match=r"diverged: .* is (nan|inf).*the adapter after round 0 of 3 and the results"
    ):
        run_alone(settings)
    _, adapter = load_adapter(tmp_path / "run" / "adapter")  # refuses what is not finite
    assert not any(bool(tensor.any()) for name, tensor in adapter.items() if ".lora_B." in name)
    assert (
        "| diverged | this adapter is that after round 0 of 3 |"
        in (tmp_path / "run" / "adapter" / "README.md").read_text()
    )
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["heldout_loss"]) == 1
