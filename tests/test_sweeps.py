"""Sweeps: folders that every file system takes, and jobs that fail alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from conf.schema import Settings
from server.results import RunResults
from server.sweep import LONGEST_NAME, SUMMARY, Sweep, differing, folder_name


def test_a_folder_is_a_number_and_what_differs() -> None:
    arguments = ["-m", "codec=learned,identity", "seed=0,1", "federation.rounds=3", "hydra.sweep.dir=x"]
    overrides = ["codec=identity", "seed=1", "federation.rounds=3"]
    assert differing(overrides, arguments) == "codec=identity,seed=1"
    assert folder_name(3, "codec=identity,seed=1") == "3-codec=identity,seed=1"
    assert folder_name(0, "") == "0"
    assert folder_name(1, "task.path='/a b/ü'") == "1-task.path=_a_b_"


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [folder_name(7, f"task.path={'x' * 300}{end}") for end in "ab"]
    assert len({*names}) == 2
    assert all(len(name) == LONGEST_NAME and name.startswith("7-task.path=xxx") for name in names)


def hydra_of(folder: Path, number: int, *overrides: str) -> Any:
    return SimpleNamespace(
        sweep=SimpleNamespace(dir=str(folder)),
        overrides=SimpleNamespace(task=list(overrides)),
        job=SimpleNamespace(num=number, config_name="federate"),
        runtime=SimpleNamespace(output_dir=str(folder / str(number))),
        sweeper=SimpleNamespace(_target_="other"),
    )


def config_of(**changes: Any) -> DictConfig:
    return OmegaConf.create(changes)


def test_a_failing_job_ends_alone_and_the_summary_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["federate", "-m", "seed=0,1,2", "codec=identity"])

    def run(settings: Settings) -> RunResults:
        if settings.seed == 1:
            raise ValueError("node [/x] is gone")
        if settings.seed == 2:
            raise RuntimeError("CUDA out of memory")
        return RunResults(settings, 10, [3.0, 2.5], seconds=4.0)

    sweep = Sweep()
    identity = {"name": "identity"}
    losses = [
        sweep.job(hydra_of(tmp_path, n, f"seed={n}", "codec=identity"), config_of(seed=n, codec=identity), run)
        for n in range(3)
    ]
    assert losses[0] == 2.5
    with pytest.raises(SystemExit, match="2 of 3 jobs did not finish"):
        sweep.end()
    jobs = json.loads((tmp_path / SUMMARY).read_text())["jobs"]
    assert [(job["number"], job["differs"], job["state"]) for job in jobs] == [
        (0, "seed=0", "finished"),
        (1, "seed=1", "failed"),
        (2, "seed=2", "failed"),
    ]
    assert jobs[0]["label"] == "coded (identity)"
    assert jobs[0]["heldout_loss"] == 2.5
    said = capsys.readouterr()
    assert "node [/x] is gone" in said.err and "CUDA out of memory" in said.err
    assert "seed=2" in said.out


def test_ctrl_c_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["federate", "-m", "seed=0,1"])

    def run(settings: Settings) -> RunResults:
        raise KeyboardInterrupt

    sweep = Sweep()
    with pytest.raises(KeyboardInterrupt):
        sweep.job(hydra_of(tmp_path, 0, "seed=0"), config_of(), run)
    with pytest.raises(SystemExit):
        sweep.end()
    assert json.loads((tmp_path / SUMMARY).read_text())["jobs"][0]["state"] == "stopped"


def test_wrong_jobs_are_said_before_the_first_and_all_are_in_the_summary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.federate", "-m", "seed=-1,-2", "arm=base", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "job 0 will fail, the others go on: seed=-1: seed=-1 must lie" in lines[0]
    assert "job 1 will fail" in lines[1]
    assert lines[-1] == "error: 2 of 2 jobs did not finish"
    assert {path.name for path in tmp_path.iterdir()} == {"0-seed=-1", "1-seed=-2", "multirun.yaml", SUMMARY}
    assert "Traceback" not in done.stderr
