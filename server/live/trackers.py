"""The libraries of experiment trackers, each by its own client.

``server.live.tracking`` says when, and takes their errors.

Where things go is by the libraries' own environment variables; without them into the run's folder, and nowhere else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED, FAILED, STOPPED = "FINISHED", "FAILED", "KILLED"
"""How a run ended, in MLflow's words."""
PROJECT = "cg-fedllm"
RUN_TAG = "cg_fedllm_run_id"
"""By which a resumed run finds its own in MLflow."""
BATCH = 100
"""So many params MLflow takes at once."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told before the first round."""

    run_id: str
    name: str
    folder: Path
    settings: Mapping[str, str]  # key -> value, without paths
    done: int  # rounds of a resumed run


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = {"purge_step": run.done + 1} if run.done else {}  # rounds after the one that the run goes on from
        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), **purge)
        self._writer.add_text("settings", _table(run.settings), run.done)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, state: str, facts: Mapping[str, str], totals: Mapping[str, float]) -> None:
        self._writer.add_text("run", _table({"state": state.lower(), **facts}))
        for name, value in totals.items():
            self._writer.add_scalar(name, value)
        self._writer.close()


def _table(pairs: Mapping[str, str]) -> str:
    """As Markdown."""
    return "\n".join(["| what | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in pairs.items())])


def database(folder: Path) -> str:
    """MLflow's address of the one in this folder: files, as they once were, it no longer keeps."""
    return f"sqlite:///{folder.absolute() / 'mlflow.db'}"


class Mlflow:
    """A run at ``MLFLOW_TRACKING_URI``, or in the database ``mlflow/mlflow.db``."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        place, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not place:
            folder = run.folder / "mlflow"
            folder.mkdir(exist_ok=True)
            place, artifacts = database(folder), (folder / "artifacts").as_uri()
        self._client = MlflowClient(place)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT, artifacts)
        found = self._client.search_runs([experiment], f"tags.{RUN_TAG} = '{run.run_id}'", max_results=1)
        if run.done and found:
            self._run_id, known = found[0].info.run_id, found[0].data.params
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id, known = (
                self._client.create_run(
                    experiment, tags={RUN_TAG: run.run_id}, run_name=f"{run.name} {run.run_id}"
                ).info.run_id,
                {},
            )
        self._tell_settings(run.settings, known)

    def _experiment(self, name: str, artifacts: str | None) -> str:
        known = self._client.get_experiment_by_name(name)
        return str(self._client.create_experiment(name, artifacts) if known is None else known.experiment_id)

    def _tell_settings(self, settings: Mapping[str, str], known: Mapping[str, str]) -> None:
        """A param of MLflow's never changes: what a resumed run has changed becomes a tag."""
        from mlflow.entities import Param, RunTag

        new = [Param(key, value) for key, value in settings.items() if key not in known]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(self._run_id, params=new[start : start + BATCH])
        changed = [
            RunTag(f"resumed.{key}", settings[key]) for key in known if settings.get(key, known[key]) != known[key]
        ]
        if changed:
            self._client.log_batch(self._run_id, tags=changed)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = round(1000 * time.time())
        metrics = [Metric(name, float(value), now, step) for name, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self, state: str, facts: Mapping[str, str], totals: Mapping[str, float]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(_plain(name), text) for name, text in facts.items()]
        self._client.log_batch(self._run_id, tags=tags)
        self.figures(0, totals)
        self._client.set_terminated(self._run_id, state)


def _plain(name: str) -> str:
    """Without what MLflow does not take in the name of a tag."""
    return "".join(c if c.isalnum() or c in "_-. /" else "" for c in name)


class Wandb:
    """A run in the folder ``wandb/``, to be sent with ``wandb sync``; with ``WANDB_MODE=online`` it is sent at once."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,  # nor what this machine is and does
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        mode: Any = os.environ.get("WANDB_MODE") or "offline"  # W&B says which it knows
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            mode=mode,
            dir=str(run.folder),
            id=run.run_id,
            name=f"{run.name} {run.run_id}",
            resume="allow" if run.done and mode == "online" else None,  # offline the id alone says it
            config=dict(run.settings),
            settings=quiet,
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")  # its own steps only rise, and a round is evaluated later

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"round": step, **figures})

    def end(self, state: str, facts: Mapping[str, str], totals: Mapping[str, float]) -> None:
        self._run.summary.update({**facts, **totals})
        self._run.finish(exit_code=0 if state == FINISHED else 1)
