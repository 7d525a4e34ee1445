"""TGAP as a Hydra job: record updates over clients and rounds on D1, train the codecs, report their fidelity.

    python -m tgap                                       # record on D1, train, write outputs/codec
    python -m tgap --data PATH --artifact PATH           # paths with any characters
    python -m tgap record=updates.safetensors            # the same, and keep the recording
    python -m tgap tgap.record=updates.safetensors       # train on an existing recording
    python -m tgap tgap.codecs=[learned] tgap.passes=10  # any setting; --cfg job lists them

The recording is a dense federated run like any other (``python -m server.federate``), on the split of each client's
data that fine-tuning does not see (the paper, section 3.1).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from conf.arguments import run_program
from conf.checks import check_files, check_settings
from conf.console import printable, say
from conf.output import open_output, provenance, write_json, write_text
from conf.schema import TgapRun, register_schemas, tgap_run_of
from gradcodec.registry import entry_of, trainable_names

if TYPE_CHECKING:  # slow to import, and not needed to refuse a setting
    from gradcodec.training.measure import Row

register_schemas()
OPTIONS = {"--artifact": "tgap.artifact", "--recording": "tgap.record", "--record": "record"}


@hydra.main(version_base="1.3", config_path="../conf", config_name="tgap")
def main(config: DictConfig) -> None:
    try:
        run(tgap_run_of(config))
    except ValueError as error:
        sys.exit(f"error: {printable(error, 2000)}")
    except KeyboardInterrupt:
        sys.exit("stopped; no artifact was half-written")


def check(settings: TgapRun) -> None:
    """Raises ValueError naming the first key that cannot be served, before any work."""
    tgap = settings.tgap
    if unknown := sorted(set(tgap.codecs) - set(trainable_names())):
        raise ValueError(f"tgap.codecs holds {unknown[0]!r}, which is none of {', '.join(trainable_names())}")
    for key, least in (("directions", 0), ("passes", 1), ("network_steps", 1)):
        if getattr(tgap, key) < least:
            raise ValueError(f"tgap.{key}={getattr(tgap, key)} must be at least {least}")
    check_settings(settings)
    if tgap.record is None:
        check_files(settings)
    elif not Path(tgap.record).is_file():
        raise ValueError(f"tgap.record={tgap.record} is no file: `python -m tgap record=FILE` makes one")
    if Path(tgap.artifact).is_file():
        raise ValueError(f"tgap.artifact={tgap.artifact} is a file: a codec artifact is a folder")


def run(settings: TgapRun) -> list[Row]:
    """Records, trains, measures, writes. Raises ValueError: something cannot be done as asked for."""
    check(settings)
    tgap = settings.tgap
    open_output(Path(tgap.artifact).parent)
    output = open_output(Path(settings.output))
    say(f"TGAP, seed {settings.seed}, in {output}; artifacts go to {tgap.artifact}")
    path = Path(tgap.record) if tgap.record is not None else record(settings)
    return train(settings, path, output)


def train(settings: TgapRun, path: Path, output: Path) -> list[Row]:
    """Trains every codec on the recording and measures it. Raises ValueError: the recording does not serve."""
    from gradcodec.artifact import RECORDED, save_artifact
    from gradcodec.build import codec_of
    from gradcodec.training.fit import Fitting, train_codec
    from gradcodec.training.measure import measure, rows_to_json
    from gradcodec.training.recording import load_recording
    from tgap.report import print_table, training_shown

    tgap = settings.tgap
    recording = load_recording(path)
    try:
        updates, heldout = recording.split(tgap.heldout_rounds, tgap.heldout_clients)
    except ValueError as error:
        raise ValueError(f"tgap.{error}") from None
    made_of = {
        "model": Path(settings.model.path).name,
        "task": settings.task.name,
        "update": settings.train.update,
        "rank": settings.lora.rank,
        "updates": len(updates),
        RECORDED: recording.exchanged_bytes,
        "seed": settings.seed,
        **provenance(),
    }
    rows: list[Row] = []
    for name in tgap.codecs:
        with training_shown(name) as progress:
            artifact = train_codec(name, Fitting(recording, updates, made_of, tgap, settings.seed, progress))
        folder = Path(tgap.artifact if name == "learned" else f"{tgap.artifact}-{name}")
        save_artifact(artifact, folder)
        print(f"{name}: artifact in {folder}, digest {artifact.digest[:16]}")
        rates = list(tgap.bits) if entry_of(artifact.kind).has_rate else [None]
        rows += measure(name, codec_of(artifact, recording.layout), recording, heldout, rates)
    print_table(rows)
    write_json({"fidelity": rows_to_json(rows), "trained_on": made_of}, output / "report.json")
    return rows


def record(settings: TgapRun) -> Path:
    """Runs the dense federation that records, as the program that a user would start."""
    output = Path(settings.output)
    path = Path(settings.record) if settings.record is not None else output / "updates.safetensors"
    own = json.loads(settings.to_json())
    del own["tgap"]
    own |= {"record": str(path), "output": str(output / "recording")}
    write_text(json.dumps(own), output / "recording.yaml")  # JSON is YAML
    command = [sys.executable, "-m", "server.federate", f"--config-path={output}", "--config-name=recording"]
    command += ["--output", str(output / "recording"), "hydra/job_logging=none", "hydra/hydra_logging=none"]
    if subprocess.run(command).returncode != 0:
        raise ValueError("the recording run failed; the reason stands above")
    return path


if __name__ == "__main__":
    run_program(main, OPTIONS)
