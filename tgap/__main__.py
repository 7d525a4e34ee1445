"""TGAP as a Hydra job: record updates over clients and rounds on D1, train the codecs, report their fidelity.

    python -m tgap                                       # record on D1, train, write outputs/codec
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

import hydra
from omegaconf import DictConfig

from conf.output import open_output, provenance, write_json, write_text
from conf.schema import TgapRun, check_settings, register_schemas, tgap_run_of
from gradcodec.artifact import save_artifact
from gradcodec.build import codec_of
from gradcodec.registry import entry_of, trainable_names
from gradcodec.training.fit import Fitting, train_codec
from gradcodec.training.measure import Row, measure, rows_to_json
from gradcodec.training.recording import load_recording
from tgap.report import print_table, training_bar

register_schemas()


@hydra.main(version_base="1.3", config_path="../conf", config_name="tgap")
def main(config: DictConfig) -> None:
    try:
        run(tgap_run_of(config))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; no artifact was half-written")


def run(settings: TgapRun) -> list[Row]:
    """Records, trains, measures, writes. Raises ValueError: something cannot be done as asked for."""
    tgap = settings.tgap
    if unknown := sorted(set(tgap.codecs) - set(trainable_names())):
        raise ValueError(f"tgap.codecs holds {unknown[0]!r}, which is none of {', '.join(trainable_names())}")
    for key, least in (("directions", 0), ("passes", 1), ("network_steps", 1)):
        if getattr(tgap, key) < least:
            raise ValueError(f"tgap.{key}={getattr(tgap, key)} must be at least {least}")
    check_settings(settings)
    open_output(Path(tgap.artifact).parent)
    output = open_output(Path(settings.output))
    if tgap.record is not None and not Path(tgap.record).is_file():
        raise ValueError(f"tgap.record={tgap.record} is no file: make one with `python -m tgap record=FILE`")
    path = Path(tgap.record) if tgap.record is not None else record(settings)
    recording = load_recording(path)
    try:
        train, heldout = recording.split(tgap.heldout_rounds, tgap.heldout_clients)
    except ValueError as error:
        raise ValueError(f"tgap.{error}") from None
    made_of = {
        "model": Path(settings.model.path).name,
        "task": settings.task.name,
        "update": settings.train.update,
        "rank": settings.lora.rank,
        "updates": len(train),
        "seed": settings.seed,
        **provenance(),
    }
    rows: list[Row] = []
    for name in tgap.codecs:
        with training_bar(name) as progress:
            artifact = train_codec(name, Fitting(recording, train, made_of, tgap, settings.seed, progress))
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
    command += [f"hydra.run.dir={output / 'recording'}", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    if subprocess.run(command).returncode != 0:
        raise ValueError("the recording run failed; the reason stands above")
    return path


if __name__ == "__main__":
    main()
