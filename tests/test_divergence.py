"""Rounds that must not become the checkpoint that a run goes on from, on the real loop."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from test_federation import run, settings_for

from adapters.export import load_adapter
from conf.output import OutputError
from server.federate import resumed
from server.records.events import read_status
from server.run.checkpoint import load_checkpoint, save_checkpoint
from server.run.evaluate import Evaluator


class Losses:
    """The evaluator's loss, of which one is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: int, loss: float) -> None:
        self.calls, real = 0, Evaluator.loss

        def replaced(evaluator: Evaluator, adapter: Mapping[str, torch.Tensor]) -> float:
            self.calls += 1
            return loss if self.calls == call else real(evaluator, adapter)

        monkeypatch.setattr(Evaluator, "loss", replaced)


@pytest.mark.parametrize("backend", ["simulation", "superlink"])
def test_a_run_that_diverges_says_so_and_keeps_the_last_good_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    settings = settings_for(tmp_path, "diverged", arm="dense", backend__name=backend)
    Losses(monkeypatch, call=3, loss=math.nan if backend == "simulation" else 1e4)  # after the second round
    with pytest.raises(
        ValueError, match=r"held-out loss after round 2 is .*[Ll]ower train\.lr.* norms .* of partition"
    ):
        run(settings, tmp_path)
    output = tmp_path / "diverged"
    kept = load_checkpoint(output)
    assert kept.server_round == 1
    assert all(math.isfinite(loss) for loss in kept.results.heldout_loss)
    _, adapter = load_adapter(output / "adapter")
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in kept.adapter.items())
    assert not (output / "results.json").exists()
    assert read_status(output).state == "failed"
    assert "Then it failed: training diverged" in (output / "report.html").read_text()
    result = run(resumed(output, [], 1), tmp_path)
    assert len(result.heldout_loss) == 4
    assert "Then it failed" not in (output / "report.html").read_text()


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def full(checkpoint: object, folder: Path) -> None:
        tries.append(1)
        if len(tries) == 2:
            raise OutputError(f"{folder}: No space left on device")
        save_checkpoint(checkpoint, folder)  # type: ignore[arg-type]

    monkeypatch.setattr("server.run.rounds.save_checkpoint", full)
    results = run(settings_for(tmp_path, "full", arm="dense"), tmp_path)
    assert len(results.heldout_loss) == 4
    events = [json.loads(line) for line in (tmp_path / "full" / "events.jsonl").read_text().splitlines()]
    (failed,) = (event for event in events if event["event"] == "checkpoint_failed")
    assert "No space left on device" in failed["reason"] and str(tmp_path / "full") in failed["reason"]
    assert (load_checkpoint(tmp_path / "full").server_round, load_checkpoint(tmp_path / "full", 1).server_round) == (
        3,
        1,
    )


def test_results_that_cannot_be_written_end_the_run_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.run.rounds.write_json", full)
    with pytest.raises(ValueError, match=rf"cannot be written to output={tmp_path / 'last'}: .*No space left"):
        run(settings_for(tmp_path, "last", arm="dense", federation__rounds=1), tmp_path)
