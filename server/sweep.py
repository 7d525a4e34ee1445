"""A sweep: many runs of one command line (``-m``), of which each may fail without ending the others.

Hydra makes the jobs; this module names their folders, lets a failing one end alone, and tells at the end what became
of each, in a table and in ``summary.json``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.console import bytes_text, printable, say
from conf.output import OutputError, write_json
from conf.schema import Settings, check_files, check_settings, settings_of
from server.compare import compare_sweep
from server.progress import label

if TYPE_CHECKING:
    from server.results import RunResults

LONGEST_NAME = 80
"""Characters of a job's folder; file systems take 255 bytes."""
SUMMARY = "summary.json"


@dataclass
class Job:
    """What became of one run of a sweep."""

    number: int
    differs: str  # the settings by which it differs from the others
    label: str  # arm and codec
    folder: str
    state: str  # finished | failed | stopped
    reason: str = ""
    heldout_loss: float | None = None
    payload_bytes_per_client_round: float | None = None
    seconds: float | None = None


def folder_name(number: object, differs: str) -> str:
    """``NUMBER-WHAT,DIFFERS``, at most ``LONGEST_NAME`` characters that every file system takes; what is cut is
    replaced by a digest, so that no two jobs share a name."""
    whole = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", f"{number}-{differs}".rstrip("-"))
    if len(whole) <= LONGEST_NAME:
        return whole
    digest = hashlib.sha256(differs.encode(errors="replace")).hexdigest()[:8]
    return f"{whole[: LONGEST_NAME - len(digest) - 1]}-{digest}"


def swept_keys(arguments: list[str]) -> list[str]:
    """The keys that a command line gives several values, in its order; those of Hydra itself are left out."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    texts = [text for text in arguments if not text.startswith("-") and "=" in text]
    try:
        overrides = OverridesParser.create().parse_overrides(texts)
    except HydraException:  # Hydra will say so itself
        return []
    keys = [one.get_key_element() for one in overrides if one.is_sweep_override()]
    return [key for key in keys if not key.startswith("hydra")]


def wrong_jobs(hydra: Any, arguments: list[str]) -> dict[int, str]:
    """The jobs that cannot be served, by number, and why: known before the first has begun. Other sweepers than
    Hydra's own choose their jobs as they go, and none is known."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not str(hydra.sweeper._target_).endswith("BasicSweeper"):
        return {}
    loader = GlobalHydra.instance().config_loader()
    texts = [text for text in arguments if not text.startswith("-") and "=" in text]
    overrides = OverridesParser.create(loader).parse_overrides(texts)
    wrong = {}
    for number, job in enumerate(BasicSweeper.split_arguments(overrides, None)[0]):
        try:
            config = loader.load_configuration(hydra.job.config_name, job, RunMode.RUN)
            with open_dict(config):
                del config["hydra"]
            settings = settings_of(config)
            check_settings(settings)
            if not settings.dry_run:
                check_files(settings)
        except ValueError as error:
            wrong[number] = f"{differing(job, arguments)}: {printable(error)}"
    return wrong


def differing(overrides: list[str], arguments: list[str]) -> str:
    """Of a job's overrides those that other jobs of the command line have not."""
    keys = swept_keys(arguments)
    return ",".join(text for text in overrides if text.partition("=")[0] in keys)


def register_resolver() -> None:
    """``${sweep_folder:NUMBER,OVERRIDES}`` for Hydra's ``sweep.subdir``."""
    OmegaConf.register_new_resolver(
        "sweep_folder",
        lambda number, overrides: folder_name(number, differing(list(overrides), sys.argv[1:])),
        replace=True,
    )


class Sweep:
    """The jobs of this process's command line."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._folder: Path | None = None

    def job(self, hydra: Any, config: DictConfig, run: Callable[[Settings], RunResults | None]) -> float:
        """Runs one, whatever becomes of it. Returns its final held-out loss, NaN if it has none.

        Raises:
            KeyboardInterrupt: the user ended the sweep.
        """
        self._folder = Path(hydra.sweep.dir).absolute()
        if not self.jobs:
            for number, reason in wrong_jobs(hydra, sys.argv[1:]).items():
                say(f"job {number} will fail, the others go on: {reason}")
        overrides = list(hydra.overrides.task)
        job = Job(int(hydra.job.num), differing(overrides, sys.argv[1:]), "", str(hydra.runtime.output_dir), "failed")
        self.jobs.append(job)
        say(f"job {job.number}: {job.differs or 'as it is'}")
        try:
            settings = settings_of(config)
            job.label, job.folder = label(settings), settings.output
            if settings.resume is not None:
                raise ValueError("resume=... goes on with one run: leave -m away")
            results = run(settings)
        except KeyboardInterrupt:
            job.state, job.reason = "stopped", "Ctrl-C"
            raise
        except ValueError as error:
            job.reason = printable(error)
        except Exception as error:  # ours or a library's: the others go on, and the trace is kept on the screen
            traceback.print_exc()
            job.reason = printable(repr(error))
        else:
            job.state = "finished"
            if results is not None:
                job.heldout_loss, job.seconds = results.heldout_loss[-1], results.seconds
                job.payload_bytes_per_client_round = results.payload_bytes_per_client_round
        if job.state == "failed":
            say(f"job {job.number} failed: {job.reason}")
        return math.nan if job.heldout_loss is None else job.heldout_loss

    def end(self) -> None:
        """The table and ``summary.json``, if there was a sweep. Exits with 1 if a job did not finish."""
        if not self.jobs:
            return
        Console(width=None if sys.stdout.isatty() else 120).print(self._table())
        failed = [job for job in self.jobs if job.state != "finished"]
        if self._folder is not None:
            try:
                write_json({"jobs": [dataclasses.asdict(job) for job in self.jobs]}, self._folder / SUMMARY)
                print(f"summary: {self._folder / SUMMARY}")
                compare_sweep(self._folder, self.jobs)
            except OutputError as error:
                print(f"error: {error}", file=sys.stderr)
        for job in failed:
            print(f"job {job.number} ({job.differs or job.label}) {job.state}: {job.reason}", file=sys.stderr)
        if failed:
            sys.exit(f"error: {len(failed)} of {len(self.jobs)} jobs did not finish")

    def _table(self) -> Table:
        table = Table(title=f"sweep of {len(self.jobs)} jobs", title_justify="left")
        for column in ("job", "differs", "what", "loss", "bytes up", "seconds", "state"):
            right = column in ("job", "loss", "bytes up", "seconds")
            table.add_column(column, justify="right" if right else "left", overflow="fold")
        for job in self.jobs:
            loss = "-" if job.heldout_loss is None else f"{job.heldout_loss:.4f}"
            sent, seconds = job.payload_bytes_per_client_round, job.seconds
            table.add_row(
                str(job.number),
                Text(printable(job.differs)),
                Text(job.label),
                loss,
                "-" if sent is None else bytes_text(sent),
                "-" if seconds is None else f"{seconds:.0f}",
                job.state,
            )
        return table
