"""How near every codec comes to updates that it was not trained on, at equal bytes, in one run.

    python -m bench.fidelity --updates FILE.safetensors [--bits 0.05,0.1,0.25,0.5,1] [--json OUT]

FILE holds recorded updates under keys ``r<round>/c<client>/<PEFT tensor name>``; ``python -m tgap record=FILE`` writes
one. Codecs that are trained are trained on the first third of the rounds; all are measured on the rest. Every byte of
a payload counts. ``learned (general)`` is the artifact of ``--artifact``, trained on other updates; ``learned (model)``
the same with the directions that both ends derive from the base model of ``--model`` and from the rounds before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.settings import ModelSettings
from bench.programs import ends_in_a_line
from conf.basis import priors_of
from conf.output import provenance, write_json
from gradcodec.artifact import load_artifact
from gradcodec.build import artifact_folder, build_codec, codec_of
from gradcodec.codec import Codec
from gradcodec.errors import CodecError
from gradcodec.learned.codec import LearnedCodec
from gradcodec.registry import codec_names, entry_of, names_with_a_rate
from gradcodec.settings import CodecSettings, FitSettings
from gradcodec.training.fit import Fitting, train_codec
from gradcodec.training.measure import Row, measure, rows_to_json
from gradcodec.training.recording import Recording, Update, load_recording

GENERAL = "learned (general)"
DERIVED = "learned (model)"


@dataclass(frozen=True)
class Given:
    """What the learned codecs are made of, beside the recording."""

    artifact: Path  # the general one
    network_steps: int  # training of the paper's autoencoders
    model: str | None = None  # folder of the base model


def main() -> None:
    parser = recording_parser(__doc__ or "")
    parser.add_argument("--codecs", default=",".join(codec_names()), help="which codecs (default: all)")
    parser.add_argument("--model", help="the base model's folder: adds `learned` with directions derived from it")
    parser.add_argument("--network-steps", type=int, default=300, help="training of the paper's autoencoders")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with ends_in_a_line():
        rates = rates_of(args.bits)
        recording = load_recording(args.updates)
        train, heldout = first_third(recording)
        names = args.codecs.split(",")
        if unknown := sorted(set(names) - set(codec_names())):
            raise ValueError(f"--codecs holds {unknown[0]!r}, which is none of {', '.join(codec_names())}")
        rows = measure_all(
            names, recording, train, heldout, rates, Given(args.artifact, args.network_steps, args.model)
        )
    print_table(rows, recording)
    save_rows(rows, recording, args.updates, args.json)


def recording_parser(description: str) -> argparse.ArgumentParser:
    """The options of every bench on a recording."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=Path, required=True, metavar="FILE", help="recorded updates")
    parser.add_argument("--bits", default="0.05,0.1,0.25,0.5,1", help="bits per parameter, payloads whole")
    parser.add_argument(
        "--artifact", type=Path, default=artifact_folder(CodecSettings()), help="the general artifact of `learned`"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT", help="save the rows")
    return parser


def save_rows(rows: list[Row], recording: Recording, updates: Path, place: Path | None) -> None:
    """What such a bench found, if the user wants it saved."""
    if place is not None:
        about = {"updates": updates.name, "num_parameters": recording.layout.num_parameters}
        write_json({"rows": rows_to_json(rows), **about, "made_with": provenance()}, place)


def first_third(recording: Recording) -> tuple[list[Update], list[Update]]:
    """Updates of the first third of the rounds, and those of the rest.

    Raises:
        ValueError: fewer than three rounds are recorded.
    """
    rounds_of(recording, at_least=3)
    return recording.first_third()


def rounds_of(recording: Recording, at_least: int) -> list[int]:
    """The recorded rounds, ascending. Raises ValueError: there are fewer."""
    rounds = recording.rounds
    if len(rounds) < at_least:
        raise ValueError(f"{len(rounds)} rounds are recorded; this bench needs at least {at_least}")
    return rounds


def rates_of(text: str) -> list[float]:
    """Comma-separated bits per parameter. Raises ValueError: one is no positive number."""
    rates = [float(rate) for rate in text.split(",")]
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"--bits {text}: bits per parameter are positive")
    return rates


def measure_all(
    names: list[str],
    recording: Recording,
    train: list[Update],
    heldout: list[Update],
    rates: list[float],
    given: Given,
) -> list[Row]:
    """The rows of all codecs at all rates; those of one rate have one row."""
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(names) + 1)
        for name, codec in _codecs(names, recording, train, given):
            progress.update(bar, description=name)
            own = rates if name in (GENERAL, DERIVED) or name in names_with_a_rate() else [None]
            for rate in own:
                try:
                    rows += measure(name, codec, recording, {"later rounds": heldout}, [rate])
                except CodecError as error:
                    print(f"{name} at {rate} bits: {error}", file=sys.stderr)
            progress.update(bar, advance=1)
    return rows


def _codecs(
    names: list[str], recording: Recording, train: list[Update], given: Given
) -> Iterator[tuple[str, Codec | dict[int, Codec]]]:
    settings = FitSettings(network_steps=given.network_steps)
    for name in names:
        if entry_of(name).needs_artifact:
            artifact = train_codec(name, Fitting(recording, train, {}, settings, 0, lambda *_: None))
            yield name, codec_of(artifact, recording.layout)
        else:
            yield name, build_codec(CodecSettings(name=name), recording.layout)
        if name == "learned" and given.artifact.is_dir():
            codec = codec_of(load_artifact(given.artifact, "learned"), recording.layout)
            yield GENERAL, codec
            if given.model is not None:
                assert isinstance(codec, LearnedCodec)
                priors = priors_of(ModelSettings(path=given.model), recording.layout)
                numbers = {update.round for update in recording.updates}
                yield DERIVED, {i: codec.starting_from(priors, recording.moved_before(i)) for i in numbers}


def print_table(rows: list[Row], recording: Recording) -> None:
    layout = recording.layout
    shape = f"{layout.num_parameters:,} parameters, {len(layout.blocks)} tensors, rank {layout.rank}"
    table = Table(title=f"single updates of later rounds, no error feedback, every byte counted ({shape})")
    for column in ("bits asked", "codec", "bits", "cosine", "error energy", "SNR dB", "aggregate cosine", "Gaussian"):
        table.add_column(column, no_wrap=True, justify="left" if column == "codec" else "right")
    last = None
    for row in sorted(rows, key=lambda row: (row.bits_requested or 64.0, row.snr_db)):
        if last is not None and row.bits_requested != last:
            table.add_section()
        last = row.bits_requested
        table.add_row(
            "own" if row.bits_requested is None else f"{row.bits_requested:g}",
            row.codec,
            f"{row.bits:.3f}",
            f"{row.cosine:.3f}",
            f"{row.error_energy:.4f}",
            f"{row.snr_db:.2f}",
            f"{row.aggregate_cosine:.3f}",
            f"{row.gaussian_bound_cosine:.3f}",
        )
    Console(width=110 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
