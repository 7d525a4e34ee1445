"""Trains an artifact for any model: tables alone, for directions that both ends derive from the base model.

    python -m tgap.general --artifact OUT RECORDING=MODEL [RECORDING=MODEL ...]

RECORDING is a file that ``python -m server.federate arm=dense record=RECORDING`` wrote, MODEL the folder of the base
model that it was made with. Give several models, ranks and kinds of update: what they have in common is learned.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.output import provenance

if TYPE_CHECKING:  # slow to import, and not needed to refuse an argument
    from gradcodec.learned.fit import DerivedSample
    from gradcodec.training.recording import Recording


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, required=True, help="folder for the artifact")
    parser.add_argument("--passes", type=int, default=6, help="fits of quantiser and entropy models to each other")
    parser.add_argument("--updates", type=int, default=6, help="of each recording, spread over its rounds (default 6)")
    parser.add_argument("recordings", nargs="+", metavar="RECORDING=MODEL")
    args = parser.parse_args()
    try:
        train(args.recordings, args.artifact, args.passes, args.updates)
    except ValueError as error:
        sys.exit(f"error: {error}")


def train(recordings: list[str], folder: Path, passes: int, most: int) -> None:
    """Trains on all recordings and writes the artifact. Raises ValueError: a recording or a model does not serve."""
    pairs = [text.rpartition("=")[::2] for text in recordings]
    if wrong := [text for text, (path, _) in zip(recordings, pairs, strict=True) if not Path(path).is_file()]:
        raise ValueError(f"{wrong[0]!r}: RECORDING=MODEL is expected, and RECORDING must be a file")
    if passes < 1 or most < 1:
        raise ValueError(f"--passes {passes} and --updates {most} must be at least 1")
    from gradcodec.artifact import RECORDED, Artifact, save_artifact
    from gradcodec.learned.fit import fit_general
    from gradcodec.training.recording import load_recording
    from tgap.report import training_shown

    samples: list[DerivedSample] = []
    recorded = 0
    for path, model in pairs:
        recording = load_recording(Path(path))
        samples += samples_of(recording, model, most)
        recorded += recording.exchanged_bytes
    with training_shown("learned") as progress:
        tables = fit_general(samples, passes=passes, progress=progress)
    made_of = {
        "recordings": [Path(path).name for path, _ in pairs],
        "updates": len(samples),
        RECORDED: recorded,
        **provenance(),
    }
    artifact = Artifact("learned", tables.to_tensors(), {"codec": {}, "trained": made_of})
    save_artifact(artifact, folder, in_one_file=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"artifact of {size:,} bytes in {folder}, digest {artifact.digest[:16]}")


def samples_of(recording: Recording, model: str, most: int) -> list[DerivedSample]:
    """Updates of a recording with what both ends would know of their rounds."""
    from adapters.settings import ModelSettings
    from conf.basis import priors_of
    from gradcodec.gauge import principal_axes
    from gradcodec.learned.basis import derive
    from gradcodec.learned.fit import DerivedSample, Sample
    from gradcodec.training.recording import side_information_of

    priors = priors_of(ModelSettings(path=model), recording.layout)
    known = side_information_of(recording)
    chosen = recording.updates[:: max(1, -(-len(recording.updates) // most))]
    moved = {number: recording.moved_before(number) for number in {update.round for update in chosen}}
    leading = {number: derive(recording.layout, priors, moved_RC) for number, moved_RC in moved.items()}
    samples = []
    for update in chosen:
        side = known[update.round]
        if side is None:  # a first round has the axes of a rehearsal: another's update stands for it
            others = [other for other in recording.updates if other.round == update.round and other is not update]
            side = principal_axes(others[0].blocks_RC, recording.layout) if others else None
        samples.append(DerivedSample(recording.layout, Sample(update.blocks_RC, side), leading[update.round]))
    return samples


if __name__ == "__main__":
    main()
