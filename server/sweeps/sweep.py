"""A sweep: many runs of one command line (``-m``), of which each may fail without ending the others.

Hydra makes the jobs, and its launchers run them: here one after another, or in other processes and on other hosts. This
module names their folders, lets a failing one end alone, and tells at the end what became of each, in a table and in
``summary.json``, by what they left (``server.sweeps.jobs``).
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from conf.checks import check_files, check_settings
from conf.console import bytes_text, printable, say
from conf.output import OutputError, write_json
from conf.schema import Settings, settings_of
from server.live.progress import label
from server.sweeps.jobs import SHOWN, Job, best_of, collect, complete, folder_name, leave, summary_of, table_of
from server.sweeps.report import compare_jobs

if TYPE_CHECKING:
    from server.records.results import RunResults

SUMMARY = "summary.json"
VARIABLE = "CG_FEDLLM_SWEEP"
"""By the environment the processes of the jobs know which sweep they are of."""


class JobError(ValueError):
    """A job failed; what a sweeper that searches is told instead of a number."""


@dataclass
class Plan:
    """What a sweep is to do, as its command line has it."""

    arguments: list[str] = field(default_factory=list)  # key=value, swept ones among them
    identity: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    process: int = field(default_factory=os.getpid)

    def tell(self) -> None:
        """To the processes that this one starts."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def told(cls) -> Plan:
        """Inverse of ``tell``; outside a sweep, one by the command line of this process."""
        try:
            return cls(**json.loads(os.environ.get(VARIABLE, "")))
        except (ValueError, TypeError):
            return cls(_key_values(sys.argv[1:]))


def _key_values(arguments: list[str]) -> list[str]:
    return [text for text in arguments if not text.startswith("-") and "=" in text]


def fixed_keys(arguments: list[str]) -> list[str]:
    """The keys to which a command line gives one value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        overrides = OverridesParser.create().parse_overrides(_key_values(arguments))
    except HydraException:  # Hydra will say so itself
        return []
    return [one.get_key_element() for one in overrides if not one.is_sweep_override()]


def differing(overrides: list[str], arguments: list[str]) -> str:
    """Of a job's overrides those that other jobs of the command line have not."""
    fixed = fixed_keys(arguments)
    return ",".join(text for text in overrides if text.partition("=")[0] not in fixed)


def is_hydras(sweeper: Any) -> bool:
    """Whether it is Hydra's own sweeper, which knows all jobs before the first; others choose them as they go."""
    return str(sweeper._target_).endswith("BasicSweeper")


def jobs_of(hydra: Any) -> list[list[str]]:
    """The overrides of every job of Hydra's own sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    texts = [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()] + list(hydra.overrides.task)
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    jobs: list[list[str]] = BasicSweeper.split_arguments(parser.parse_overrides(texts), None)[0]
    return jobs


def wrong_jobs(hydra: Any, jobs: list[list[str]]) -> dict[int, str]:
    """The jobs that cannot be served, by number, and why: known before the first has begun."""
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    wrong = {}
    for number, job in enumerate(jobs):
        try:
            config = loader.load_configuration(hydra.job.config_name, job, RunMode.RUN)
            with open_dict(config):
                del config["hydra"]
                config.output = hydra.sweep.dir  # the job's own folder is not known yet
            settings = settings_of(config)
            check_settings(settings)
            check_side_by_side(hydra, settings.arm, settings.backend.name)
            if not settings.dry_run:
                check_files(settings)
        except HydraException:  # Hydra will say so itself, of all jobs
            return {}
        except ValueError as error:
            wrong[number] = printable(error)
    return wrong


def check_side_by_side(hydra: Any, arm: str, backend: str) -> None:
    """Raises ValueError: the launcher would run several simulations at once on this machine, of which each takes all of
    it."""
    launcher = hydra.launcher
    kind = str(launcher._target_).rpartition(".")[2]
    at_once = {"JoblibLauncher": launcher.get("n_jobs") != 1, "LocalLauncher": True}.get(kind, False)
    if at_once and backend == "simulation" and arm in ("dense", "coded"):
        raise ValueError(
            "backend.name=simulation and a launcher that runs jobs side by side on this machine do not go together: "
            "each simulation takes all its cores; give backend=inprocess"
        )


def register_resolver() -> None:
    """``${sweep_folder:NUMBER,OVERRIDES}`` for Hydra's ``sweep.subdir``."""
    OmegaConf.register_new_resolver(
        "sweep_folder",
        lambda number, overrides: folder_name(number, differing(list(overrides), Plan.told().arguments)),
        replace=True,
    )


class Begins(Callback):  # type: ignore[misc]  # Hydra has no types for us
    """Hydra's word that a sweep begins, in the process of its command line."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            SWEEP.begin(config)
        except ValueError as error:  # which Hydra would make a warning of
            sys.exit(f"error: {printable(error)}")


class Sweep:
    """The sweep of this process's command line, or that of which this process runs a job."""

    def __init__(self) -> None:
        self.jobs: dict[int, Job] = {}  # that ran in this process
        self._expected: dict[int, str] = {}
        self._folder: Path | None = None
        self._plan = Plan.told()
        self._has_workers = False

    def begin(self, config: DictConfig) -> None:
        """Before the first job: which there will be, and which of them cannot be served.

        Raises:
            ValueError: none can, on this launcher.
        """
        hydra = config.hydra
        plan = Plan(list(hydra.overrides.task))
        swept = {text.partition("=")[0] for text in plan.arguments} - {*fixed_keys(plan.arguments)}
        if not swept & {"arm", "backend", "backend.name"}:  # else it is the affair of each job
            check_side_by_side(hydra, str(config.arm), str(config.backend.name))
        self._folder, self._plan = Path(hydra.sweep.dir).absolute(), plan
        self._has_workers = str(hydra.launcher._target_).endswith("JoblibLauncher")
        plan.tell()
        if not is_hydras(hydra.sweeper):
            logging.getLogger("optuna.study").setLevel(logging.WARNING)  # what it says, our lines and table say
            self._expected = dict.fromkeys(range(int(hydra.sweeper.get("n_trials") or 0)), "")
            return
        try:
            jobs = jobs_of(hydra)
        except HydraException:  # Hydra will say so itself
            return
        self._expected = {number: differing(job, plan.arguments) for number, job in enumerate(jobs)}
        for number, reason in wrong_jobs(hydra, jobs).items():
            say(f"job {number} will fail, the others go on: {self._expected[number]}: {reason}")

    def job(self, hydra: Any, config: DictConfig, run: Callable[[Settings], RunResults | None]) -> float | list[float]:
        """Runs one, whatever becomes of it. Returns what a sweeper makes small (``server.sweeps.search``), NaN if
        there is nothing.

        Raises:
            KeyboardInterrupt: the user ended the sweep.
            JobError: it failed, and a sweeper that searches needs to know.
        """
        folder = Path(hydra.runtime.output_dir).absolute()
        self._folder = self._folder or Path(hydra.sweep.dir).absolute()
        differs = differing(list(hydra.overrides.task), self._plan.arguments)
        job = Job(int(hydra.job.num), differs, folder=str(folder), sweep=self._plan.identity)
        self.jobs[job.number] = job
        if os.getpid() != self._plan.process:
            os.environ["TERM"] = "dumb"  # lines: several bars would draw over each other
        say(f"job {job.number}: {job.differs or 'as it is'}")
        _leave(job, folder)
        try:
            found = _run(job, hydra, config, run)
        except KeyboardInterrupt:
            job.state, job.reason = "stopped", "Ctrl-C"
            raise
        except ValueError as error:
            job.state, job.reason = "failed", printable(error)
        except Exception as error:  # ours or a library's: the others go on, and the trace is kept on the screen
            traceback.print_exc()
            job.state, job.reason = "failed", printable(repr(error))
        else:
            job.state = "finished"
            return found
        finally:
            _leave(job, folder)
        say(f"job {job.number} failed: {job.reason}")
        if not is_hydras(hydra.sweeper):
            raise JobError(job.reason)
        return math.nan

    def run(self, program: Callable[[], None]) -> None:
        """Runs the command line, and tells of the sweep, if it was one, however that ended."""
        wrong = ""
        try:
            program()
        except SystemExit as end:
            if self._folder is None or not self._left():  # refused as a whole
                raise
            wrong = end.code if isinstance(end.code, str) else ""
        except Exception as error:  # a launcher's or a sweeper's; what its jobs left is told all the same
            if self._folder is None:
                raise
            wrong = f"error: {type(error).__name__}: {printable(str(error).partition(chr(10))[0])}"
        if self._has_workers:
            _end_workers()
        self.end(wrong)

    def _left(self) -> dict[int, Job]:
        return {**(collect(self._folder, self._plan.identity) if self._folder is not None else {}), **self.jobs}

    def end(self, wrong: str = "") -> None:
        """The table and ``summary.json``, if there was a sweep. Exits with 1 if a job did not finish.

        Args:
            wrong: what the launcher, the sweeper or the user ended the sweep with.
        """
        if self._folder is None:
            return
        left = self._left()
        stopped = wrong == "stopped" or any(job.state == "stopped" for job in left.values())
        jobs = complete(self._expected, left, stopped, self._plan.identity)
        Console(width=None if sys.stdout.isatty() else 120).print(table_of(jobs))
        _say_best(jobs)
        try:
            write_json(summary_of(jobs), self._folder / SUMMARY)
            print(f"summary: {self._folder / SUMMARY}")
            compare_jobs(self._folder, jobs)
        except OutputError as error:
            print(f"error: {error}", file=sys.stderr)
        failed = [job for job in jobs if job.state != "finished"]
        for job in failed[:SHOWN]:
            print(f"job {job.number} ({job.differs or job.label}) {job.state}: {job.reason}", file=sys.stderr)
        if len(failed) > SHOWN:
            print(f"and {len(failed) - SHOWN} more", file=sys.stderr)
        if wrong:
            print(wrong, file=sys.stderr)
        if failed or wrong:
            sys.exit(f"error: {len(failed)} of {len(jobs)} jobs did not finish")


def _run(job: Job, hydra: Any, config: DictConfig, run: Callable[[Settings], RunResults | None]) -> float | list[float]:
    settings = settings_of(config)
    job.label, job.folder = label(settings), settings.output
    check_side_by_side(hydra, settings.arm, settings.backend.name)
    if settings.resume is not None:
        raise ValueError("resume=... goes on with one run: leave -m away")
    results = run(settings)
    if results is None:  # a dry run
        return math.nan
    from server.sweeps.search import objective

    job.take(results)
    job.target_loss = settings.search.target_loss
    return objective(settings, results)


def _end_workers() -> None:
    """Those of joblib would wait for more jobs for five minutes, each with its model, though this process is gone."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _leave(job: Job, folder: Path) -> None:
    """A full disk costs the word of this job, not the job."""
    try:
        leave(job, folder)
    except OutputError as error:
        say(f"job {job.number}: {error}")


def _say_best(jobs: list[Job]) -> None:
    targets = {job.target_loss for job in jobs if job.target_loss is not None}
    if not targets:
        return
    asked = f"a held-out loss of at most {max(targets):g}"
    best = best_of(jobs)
    if best is None:
        print(f"no job kept {asked}")
        return
    print(
        f"fewest bytes at {asked}: job {best.number} ({best.differs}), {bytes_text(best.total_bytes or 0)} in all, "
        f"loss {best.heldout_loss:.4f}"
    )


SWEEP = Sweep()
