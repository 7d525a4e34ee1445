"""Sweeps: folders that every file system takes, and jobs that fail alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from bench.search import best_of as best_job
from bench.search import spread
from conf.arguments import refusal
from conf.schema import SearchSettings, Settings
from server.records.results import RunResults
from server.sweeps.jobs import (
    LEFT,
    LONGEST_NAME,
    Job,
    best_of,
    collect,
    complete,
    folder_name,
    leave,
    mark_pareto,
    summary_of,
)
from server.sweeps.search import objective
from server.sweeps.sweep import SUMMARY, JobError, Sweep, check_side_by_side, differing
from strategies.outcomes import Downlink, Uplink


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


def hydra_of(folder: Path, number: int, *overrides: str, sweeper: str = "BasicSweeper", launcher: str = "Basic") -> Any:
    (folder / str(number)).mkdir(exist_ok=True)  # as Hydra does
    return OmegaConf.create(
        {
            "sweep": {"dir": str(folder)},
            "overrides": {"task": list(overrides)},
            "job": {"num": number, "config_name": "federate"},
            "runtime": {"output_dir": str(folder / str(number))},
            "sweeper": {"_target_": sweeper},
            "launcher": {"_target_": f"x.{launcher}Launcher", "n_jobs": 2},
        }
    )


def config_of(**changes: Any) -> DictConfig:
    return OmegaConf.create(changes)


def results_of(settings: Settings, loss: float, payload_bytes: int) -> RunResults:
    uplink = Uplink(1, 0, payload_bytes, "", None, 1.0, 0.1)
    downlink = Downlink(1, 0, step_bytes=30)
    return RunResults(settings, 400, [3.0, loss], [uplink], seconds=4.0, downlinks=[downlink], delivery_bytes=[70])


def test_a_failing_job_ends_alone_and_the_summary_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["federate", "-m", "seed=0,1,2", "codec=identity"])

    def run(settings: Settings) -> RunResults:
        if settings.seed == 1:
            raise ValueError("node [/x] is gone")
        if settings.seed == 2:
            raise RuntimeError("CUDA out of memory")
        return results_of(settings, 2.5, 100)

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
    assert (jobs[0]["payload_bytes_per_client_round"], jobs[0]["total_bytes"], jobs[0]["bits_per_parameter"]) == (
        100.0,
        200,
        2.0,
    )
    assert [job["pareto"] for job in jobs] == [True, False, False]
    said = capsys.readouterr()
    assert "node [/x] is gone" in said.err and "CUDA out of memory" in said.err
    assert "seed=2" in said.out and "200 B" in said.out and "2.000" in said.out


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


def test_a_sweeper_that_searches_is_told_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["federate", "-m", "codec.bits=interval(0.1,1)"])

    def run(settings: Settings) -> RunResults:
        raise ValueError("no disk")

    sweep = Sweep()
    with pytest.raises(JobError, match="no disk"):
        sweep.job(hydra_of(tmp_path, 0, "codec.bits=0.2", sweeper="OptunaSweeper"), config_of(), run)
    assert json.loads((tmp_path / "0" / LEFT).read_text())["state"] == "failed"


@pytest.mark.parametrize(
    ("search", "loss", "told"),
    [
        ({}, 2.5, 2.5),
        ({"objective": "loss_and_bytes"}, 2.5, [2.5, 200.0]),
        ({"objective": "bytes", "target_loss": 2.5}, 2.5, 200.0),
        # uncoded: 400 parameters of 4 bytes, up and down for 5 clients in 12 rounds, and to all 10 at the end
        ({"objective": "bytes", "target_loss": 2.0}, 2.5, 1600 * (2 * 5 * 12 + 10) * 1.5),
    ],
)
def test_what_a_sweeper_is_told(search: dict[str, Any], loss: float, told: Any) -> None:
    settings = Settings(search=SearchSettings(**search))
    assert objective(settings, results_of(settings, loss, 100)) == told


def test_a_job_stands_out_by_loss_and_bytes() -> None:
    points = [(3.0, 100), (2.9, 200), (2.95, 200), (2.9, 300), (3.0, 100), (float("nan"), 1), (2.0, None)]
    jobs = [Job(n, state="finished", heldout_loss=loss, total_bytes=size) for n, (loss, size) in enumerate(points)]
    jobs.append(Job(7, state="failed", heldout_loss=1.0, total_bytes=1))
    mark_pareto(jobs)
    assert [job.number for job in jobs if job.pareto] == [0, 1, 4]
    assert best_of(jobs) is None
    for job in jobs[:4]:
        job.target_loss = 2.96
    best = best_of(jobs)
    assert best is not None and best.number == 1
    assert summary_of(jobs)["best"] == 1


def test_jobs_are_known_by_what_they_left(tmp_path: Path) -> None:
    """Of six jobs one finished and one failed; of the rest one was killed, one never began, the file of one is damaged,
    and that of one is of an earlier sweep in the same folder."""
    done, refused = (
        Job(0, state="finished", heldout_loss=2.5, total_bytes=9, sweep="own"),
        Job(1, "seed=1", sweep="own"),
    )
    refused.state, refused.reason = "failed", "no"
    for job in (done, refused, Job(2, sweep="own"), Job(5, state="finished", sweep="earlier")):
        (tmp_path / str(job.number)).mkdir()
        leave(job, tmp_path / str(job.number))
    for number, text in ((4, "{"), (6, "[" * 100_000), (7, '{"number": "7", "sweep": "own"}'), (8, '{"numbr": 8}')):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / LEFT).write_text(text)
    left = collect(tmp_path, "own")
    assert left.keys() == {0, 1, 2}
    jobs = complete({number: f"seed={number}" for number in range(6)}, left, stopped=False)
    assert [job.state for job in jobs] == ["finished", *5 * ["failed"]]
    assert jobs[2].reason.startswith("its process ended before it did")
    assert jobs[3].differs == "seed=3" and jobs[3].reason == "it left nothing: it never began"
    jobs = complete({3: ""}, {2: Job(2, sweep="own")}, stopped=True)
    assert [(job.state, job.reason) for job in jobs] == [
        ("stopped", "Ctrl-C"),
        ("stopped", "it left nothing: it never began"),
    ]


@pytest.mark.parametrize("launcher", ["Joblib", "Local"])
def test_simulations_are_not_run_side_by_side(tmp_path: Path, launcher: str) -> None:
    hydra = hydra_of(tmp_path, 0, launcher=launcher)
    with pytest.raises(ValueError, match="give backend=inprocess"):
        check_side_by_side(hydra, "coded", "simulation")
    check_side_by_side(hydra, "coded", "inprocess")
    check_side_by_side(hydra, "base", "simulation")
    check_side_by_side(hydra_of(tmp_path, 0, launcher="Slurm"), "coded", "simulation")
    if launcher == "Joblib":
        hydra.launcher.n_jobs = 1
        check_side_by_side(hydra, "coded", "simulation")


def test_what_a_missing_plugin_is_installed_with_is_said() -> None:
    error = MissingConfigException("", "hydra/launcher/joblib", ["basic"])
    assert refusal(error) == "hydra/launcher=joblib is not installed: pip install 'cg-fedllm[sweep]'"
    error = MissingConfigException("", "hydra/launcher/job", ["basic", "joblib"])
    assert refusal(error) == "hydra/launcher=job: there is no such hydra/launcher: did you mean joblib?"


def test_a_sweep_that_hydra_refuses_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.federate", "-m", "codec=learned,zip", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: codec=zip: there is no such codec")
    assert not (tmp_path / SUMMARY).exists()


def test_side_by_side_simulations_are_refused_before_any_job(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    command = [sys.executable, "-m", "server.federate", "-m", "hydra/launcher=joblib", "seed=0,1"]
    done = subprocess.run([*command, f"hydra.sweep.dir={tmp_path}"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert done.stderr.endswith("give backend=inprocess\n")
    assert not list(tmp_path.iterdir())


def swept(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, "-m", "server.federate", "-m", *arguments, "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, json.loads((folder / SUMMARY).read_text())


TINY = [
    "backend=inprocess",
    "federation.rounds=1",
    "federation.num_clients=2",
    "federation.clients_per_round=1",
    "federation.rehearsal_steps=0",
    "train.steps=1",
    "task.heldout_windows=2",
    "codec.down_bits=1",
]


def test_of_six_jobs_one_fails(tmp_path: Path) -> None:
    bits = ["0.05", "0.1", "0.2", "0.5", "1", "-1"]
    done, summary = swept(tmp_path, f"codec.bits={','.join(bits)}", *TINY)
    assert done.returncode == 1, done.stderr
    jobs = summary["jobs"]
    assert [(job["differs"], job["state"]) for job in jobs] == [
        (f"codec.bits={one}", "failed" if one == "-1" else "finished") for one in bits
    ]
    assert "codec.bits=-1.0" in jobs[-1]["reason"]
    for job, one in zip(jobs[:-1], bits, strict=False):
        results = json.loads((Path(job["folder"]) / "results.json").read_text())
        assert job["heldout_loss"] == results["heldout_loss"][-1]
        assert job["total_bytes"] == results["bytes"]["total"]
        assert job["payload_bytes_per_client_round"] == results["uplink_payload_bytes_per_client_round"]
        assert 0 < job["bits_per_parameter"] <= float(one)
    assert jobs[0]["pareto"], "nothing takes fewer bytes"
    assert not jobs[-1]["pareto"]
    for text in ("sweep of 6 jobs", "in all", "codec.bits=0.05", "failed"):
        assert text in done.stdout
    assert done.stderr.splitlines()[-1] == "error: 1 of 6 jobs did not finish"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_runs_jobs_in_other_processes(tmp_path: Path, launcher: str) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher")
    few = ["arm=base", "task.heldout_windows=2", "seed=0,-1"]
    few += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done, summary = swept(tmp_path, f"hydra/launcher={launcher}", *few)
    assert done.returncode == 1, done.stderr
    good, bad = summary["jobs"]
    assert (good["differs"], good["state"], bad["differs"], bad["state"]) == ("seed=0", "finished", "seed=-1", "failed")
    assert "seed=-1 must lie" in bad["reason"]
    assert good["heldout_loss"] > 0 and (tmp_path / "0-seed=0" / "results.json").is_file()
    assert done.stderr.splitlines()[-1] == "error: 1 of 2 jobs did not finish"


def test_optuna_searches_for_the_fewest_bytes(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    few = ["+search=fewest_bytes", "search.target_loss=9", "hydra.sweeper.n_trials=2"]
    done, summary = swept(tmp_path, *few, "federation.retries=0", *(one for one in TINY if "down_bits" not in one))
    assert done.returncode == 0, done.stderr
    jobs = summary["jobs"]
    assert all(re.fullmatch(r"codec\.bits=0\.\d+", job["differs"]) for job in jobs)
    best = min(jobs, key=lambda job: int(job["total_bytes"]))
    assert summary["best"] == best["number"]
    assert f"fewest bytes at a held-out loss of at most 9: job {best['number']}" in done.stdout
    found: Any = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert found["best_value"] == best["total_bytes"]
    assert f"codec.bits={found['best_params']['codec.bits']}" == best["differs"]


def test_the_benchs_search_found_what_its_grid_did() -> None:
    found = json.loads(Path("bench/results/search.json").read_text())
    for what in ("grid", "search"):
        assert best_job(found[what], what) == found[f"best_of_{what}"]
    assert found["best_of_search"]["total_bytes"] <= 1.2 * found["best_of_grid"]["total_bytes"]
    assert spread(0.05, 1, 3) == pytest.approx([0.05, 0.05 * 20**0.5, 1])
    with pytest.raises(ValueError, match="no run of the grid kept the loss"):
        best_job([{"heldout_loss": 3.0, "target_loss": 2.9, "total_bytes": 1}], "grid")


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
