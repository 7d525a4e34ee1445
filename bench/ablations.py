"""What every part of the learned codec is worth: one row each with that part switched off, in one run.

    python -m bench.ablations --updates FILE.safetensors [--bits 0.05,0.1,0.25,0.5,1] [--json OUT]

FILE is a recording as for ``bench.fidelity``, of at least six rounds. All rows are measured on the last third of the
rounds. ``trained on N rounds`` is the whole codec after the first N; all other rows learned from the first third.
Error feedback shows in runs alone: ``python -m bench.loss_over_bytes --runs learned@0.1,learned@0.1:codec.feedback=0``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.fidelity import rates_of, recording_parser, rounds_of, save_rows
from bench.programs import ends_in_a_line
from gradcodec.artifact import load_artifact
from gradcodec.build import codec_of
from gradcodec.codec import Codec, WithoutSideInformation
from gradcodec.entropy import integer_table
from gradcodec.learned.codec import LearnedCodec
from gradcodec.learned.fit import Sample, fit_learned
from gradcodec.learned.quantizer import ClassCoder
from gradcodec.learned.spectrum import Expected
from gradcodec.learned.tables import LearnedTables
from gradcodec.settings import FitSettings
from gradcodec.training.measure import Row, measure
from gradcodec.training.recording import Recording, Update, load_recording, side_information_of

ROUNDS = (1, 3, 10)


class _WithoutAxes(WithoutSideInformation, LearnedCodec):
    """Every block keeps its own rows."""


class _PlainRounding(ClassCoder):
    """Takes the nearest centroid, whatever it costs."""

    def thresholds(self) -> Tensor:
        return (self.centroids_M[1:] + self.centroids_M[:-1]) / 2


def main() -> None:
    args = recording_parser(__doc__ or "").parse_args()
    torch.set_num_threads(args.threads)
    with ends_in_a_line():
        rates = rates_of(args.bits)
        recording = load_recording(args.updates)
        rounds = rounds_of(recording, at_least=6)
        heldout = [u for u in recording.updates if u.round in rounds[-(len(rounds) // 3) :]]
        num_variants = 7 + len(ROUNDS)
        rows: list[Row] = []
        found = variants(recording, rounds, args.artifact)
        for name, codec in track(found, "ablations", num_variants, console=Console(stderr=True), transient=True):
            rows += measure(name, codec, recording, {"later rounds": heldout}, rates)
    print_table(rows, rates, len(heldout))
    save_rows(rows, recording, args.updates, args.json)


def variants(recording: Recording, rounds: Sequence[int], general: Path) -> Iterator[tuple[str, Codec]]:
    """The whole codec, then every part switched off, then other training."""
    layout = recording.layout
    third = rounds[: len(rounds) // 3]
    trained = [u for u in recording.updates if u.round in third]
    tables = _fitted(recording, trained)
    yield "whole", LearnedCodec(layout, tables, b"whole")
    unturned = fit_learned([Sample(u.blocks_RC, None) for u in trained], layout)
    yield "no rotation along the rank", _WithoutAxes(layout, unturned, b"unturned")
    own_columns = _fitted(recording, trained, FitSettings(directions=0))
    yield "no rotation along the width", LearnedCodec(layout, own_columns, b"own columns")
    yield "no expected spectrum", LearnedCodec(layout, _unexpecting(tables), b"unexpecting")
    yield "no entropy coding", LearnedCodec(layout, _with_coders(tables, _fixed_length), b"fixed length")
    yield "no search (plain rounding)", LearnedCodec(layout, _with_coders(tables, _plain), b"plain")
    if general.is_dir():
        yield "general artifact", codec_of(load_artifact(general, "learned"), layout)
    for number in ROUNDS:
        if number <= len(rounds) - len(rounds) // 3:
            early = [u for u in recording.updates if u.round in rounds[:number]]
            name = f"trained on {number} round{'s' if number > 1 else ''}"
            yield name, LearnedCodec(layout, _fitted(recording, early), name.encode())


def _fitted(recording: Recording, updates: Sequence[Update], settings: FitSettings | None = None) -> LearnedTables:
    settings = settings or FitSettings()
    known = side_information_of(recording)
    samples = [Sample(update.blocks_RC, known[update.round]) for update in updates]
    return fit_learned(samples, recording.layout, directions=settings.directions, passes=settings.passes)


def _unexpecting(tables: LearnedTables) -> LearnedTables:
    """All rows and columns are expected alike: what differs, payloads must say."""
    flat = {name: Expected((0,) * len(e.rows), (0,)) for name, e in tables.expected.items()}
    return dataclasses.replace(tables, expected=flat, any_rows=(0,))


def _with_coders(tables: LearnedTables, change: Callable[[ClassCoder], ClassCoder]) -> LearnedTables:
    return dataclasses.replace(tables, coders={c: change(coder) for c, coder in tables.coders.items()})


def _fixed_length(coder: ClassCoder) -> ClassCoder:
    """Every symbol of a class costs the same."""
    table = integer_table(np.ones(len(coder.table)))
    return ClassCoder(table, coder.centroids_M)


def _plain(coder: ClassCoder) -> ClassCoder:
    return _PlainRounding(coder.table, coder.centroids_M)


def print_table(rows: list[Row], rates: list[float], num_updates: int) -> None:
    table = Table(
        title=f"error energy over energy at so many bits per parameter, {num_updates} updates of later rounds"
    )
    table.add_column("codec", no_wrap=True)
    for rate in rates:
        table.add_column(f"{rate:g}", justify="right")
    for name in dict.fromkeys(row.codec for row in rows):
        errors = {row.bits_requested: row.error_energy for row in rows if row.codec == name}
        table.add_row(name, *(f"{errors[rate]:.3f}" for rate in rates))
    Console(width=100 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
