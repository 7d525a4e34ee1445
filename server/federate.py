"""One whole federated run, composed by Hydra.

python -m server.federate [arm=coded|dense|centralised|base] [codec=learned|identity|rotated|...] [key=value ...]
python -m server.federate --data PATH --model PATH --output PATH     # paths with any characters
python -m server.federate -m codec=learned,identity seed=0,1        # a sweep
python -m server.federate -m +search=fewest_bytes search.target_loss=3.4  # Optuna looks for the fewest bytes
python -m server.federate backend=superlink                          # on a running SuperLink, over gRPC
python -m server.federate backend=inprocess                          # clients take turns in this process, on its GPU
python -m server.federate resume=outputs/federate/2026-01-31/12-00-00  # a run that did not end, bit for bit
python -m server.federate resume=latest                              # the one that was started last
python -m server.federate +experiment=llama7b_dolly dry_run=true      # what a run would do: steps, bytes, memory, time
python -m server.federate --cfg job                                  # every setting and its value
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from adapters.settings import is_hub_name
from conf.arguments import run_program
from conf.checks import check_files, check_settings
from conf.console import printable, say
from conf.output import open_output
from conf.processes import leaving_threads_behind
from conf.schema import Settings, changed, register_schemas, settings_of
from server.live.progress import label
from server.quiet import quiet
from server.records.alive import check_free
from server.records.places import CHECKPOINT, continuation, found, remember
from server.sweeps.sweep import SWEEP, register_resolver

if TYPE_CHECKING:  # slow to import, and not needed to refuse a setting
    from server.plan import Plan
    from server.records.results import RunResults

register_schemas()
register_resolver()

FIXED = ("federation.num_clients", "federation.clients_per_round", "federation.keep_best")
"""Of the settings of a federation, those that a resumed run cannot change."""
TRUST = "model.trust_remote_code"
"""Whether code that comes with a model is run: a resumed run's folder does not decide that."""
OPTIONS = {"--resume": "resume"}


@hydra.main(version_base="1.3", config_path="../conf", config_name="federate")
def main(config: DictConfig) -> float | list[float]:
    """Returns the final held-out loss; in a sweep what ``search.objective`` names, for Hydra's sweepers."""
    quiet()
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return SWEEP.job(HydraConfig.get(), config, one)
    try:
        settings = settings_of(config)
        if settings.resume is not None:
            settings = resumed(found(settings.resume), HydraConfig.get().overrides.task, settings.from_round)
        try:
            results = one(settings)
        except KeyboardInterrupt as stop:
            sys.exit(str(stop) or f"stopped; {continuation(Path(settings.output))}")
    except ValueError as error:
        sys.exit(f"error: {printable(error, 2000)}")
    loss = None if results is None else results.final_loss
    return math.nan if loss is None else loss


def one(settings: Settings) -> RunResults | None:
    """Runs what the settings ask for, and says how it ended. None: a dry run.

    Raises:
        ValueError: it cannot be done as asked for.
    """
    if settings.dry_run:
        from server.plan import print_plan

        print_plan(planned(settings))
        return None
    if not settings.run_id:
        settings.run_id = uuid.uuid4().hex[:12]
    results = run(settings)
    print(
        f"{label(settings)}: {results.change_of_loss()}, "
        f"{results.payload_bytes_per_client_round:.0f} payload bytes a client and round, "
        f"{results.seconds:.0f} s, results in {settings.output}"
    )
    return results


def planned(settings: Settings) -> Plan:
    """``plan_of``; where the model is not here, the error says what serves a dry run as well."""
    check_settings(settings)
    from server.plan import plan_of

    try:
        return plan_of(settings)
    except ValueError as error:
        if not is_hub_name(settings.model.path):
            raise
        raise ValueError(f"{error}; a dry run needs its shapes alone: model.path=assets/geometries/NAME") from None


def resumed(folder: Path, overrides: Sequence[str], from_round: int | None = None) -> Settings:
    """The settings of a run that did not end, those of ``federation`` and ``backend`` changed as asked for.

    Code that comes with the model runs only if the command line says so again, whatever the folder says.

    Raises:
        ValueError: there is no checkpoint, another process runs in the folder, or an override would make it another
            run.
    """
    check_free(folder)
    if not (folder / CHECKPOINT).is_file():  # said before torch is loaded
        raise ValueError(
            f"resume={folder}: there is no {CHECKPOINT}: the run ended before its first round, or is no run"
        )
    from server.run.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(folder, from_round)
    settings = checkpoint.settings
    same = f"backend={settings.backend.name}"
    own = [text for text in overrides if text.split("=")[0] not in ("resume", "from_round", "output") and text != same]
    for text in own:
        key = text.split("=")[0]
        if (not key.startswith(("federation.", "backend.")) and key != TRUST) or key in FIXED:
            raise ValueError(f"resume={folder} goes on with the settings of that run: {text} cannot be changed")
    settings.model.trust_remote_code = False
    settings = changed(settings, own)
    settings.resume = settings.output = str(folder.absolute())
    settings.from_round = from_round
    if checkpoint.server_round >= settings.federation.rounds and (folder / "results.json").is_file():
        raise ValueError(
            f"resume={folder}: all {settings.federation.rounds} rounds are done; federation.rounds=N adds some"
        )
    say(f"resuming {folder} after round {checkpoint.server_round} of {settings.federation.rounds}")
    return settings


def run(settings: Settings) -> RunResults:
    """Runs one arm on the back end of the settings. Raises ValueError: it cannot run as asked for."""
    check_settings(settings)
    check_files(settings)
    output = open_output(Path(settings.output))
    check_free(output)
    remember(output)
    if settings.federation.trackers and settings.backend.name != "superlink":  # there its host needs the libraries
        from server.live.tracking import check_trackers

        check_trackers(settings.federation.trackers)
    say(f"{label(settings)}, seed {settings.seed}, in {output}")
    if settings.arm in ("base", "centralised"):
        from server.run.centralised import run_alone

        return run_alone(settings)
    if settings.backend.name == "simulation":
        from server.backends.simulation import run_in_simulation

        return run_in_simulation(settings)
    if settings.backend.name == "inprocess":
        from server.backends.inprocess import run_in_process

        return run_in_process(settings)
    from server.backends.superlink import run_on_superlink

    return run_on_superlink(settings)


if __name__ == "__main__":
    from server.federate import main as program  # by its name, under which other processes find it, too

    with leaving_threads_behind():
        SWEEP.run(lambda: run_program(program, OPTIONS))
