"""What the linear code of secure aggregation makes of the sum of a round's updates, beside the open codecs.

    python -m bench.linear_code --updates FILE.safetensors [--model FOLDER] [--clients N] [--bits 0.1,0.5] [--json OUT]

FILE is a recording as for ``bench.fidelity``. Its rounds are followed in their order, as in a run: what both ends know
of a round comes from the sums decoded before, and every client adds half of its residual to its next update. The last
client's update of the first round stands in for the server's rehearsal. The tables are those of ``--artifact``.

``once``: error energy of the decoded sum over the sum's, without residuals, mean over all rounds but the first;
``fed``: the same of sums with residuals in them; ``run``: of all decoded sums together against all updates together,
after the last round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adapters.settings import ModelSettings
from bench.fidelity import rates_of, recording_parser
from bench.programs import ends_in_a_line
from conf.basis import priors_of
from conf.output import provenance, write_json
from gradcodec.announcement import Announcement
from gradcodec.artifact import load_artifact
from gradcodec.build import build_codec, codec_of
from gradcodec.codec import Codec
from gradcodec.exchange import encode_update, max_payload_bytes
from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.gauge import principal_axes
from gradcodec.learned.basis import Prior
from gradcodec.learned.codec import LearnedCodec
from gradcodec.linear import Basis, LinearCode, Terms, announce_first
from gradcodec.settings import CodecSettings
from gradcodec.training.recording import Recording, load_recording

FEEDBACK = 0.5
OPEN = ("learned", "rotated")


@dataclass(frozen=True)
class Row:
    """One code at one rate: see the module. ``bits`` are of a client's bytes, ``announced_bytes`` those of the server's
    announcement, ``residual`` the mean norm of the last round's residuals over that of its updates."""

    code: str
    clients: int
    bits_requested: float
    bits: float
    once: float
    fed: float
    run: float
    residual: float
    announced_bytes: int


@dataclass
class Known:
    """What both ends know before a round."""

    number: int
    last_RC: Tensor
    moved_RC: Tensor | None


class Arm(Protocol):
    """A way to send a round's targets."""

    num_bytes: int
    announced_bytes: int

    @property
    def name(self) -> str: ...

    def begin(self, known: Known, num_clients: int, max_bytes: int) -> None: ...

    def send(self, targets: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Targets by client -> the decoded sum, and what each client added to it."""
        ...


@dataclass
class OpenArm:
    """An open codec: every payload is decoded by itself."""

    name: str
    learned: LearnedCodec
    priors: Mapping[str, Prior]
    num_bytes: int = 0
    announced_bytes: int = 0

    def begin(self, known: Known, num_clients: int, max_bytes: int) -> None:
        self._codec: Codec = build_codec(CodecSettings(name=self.name), self.learned.layout)
        if self.name == "learned":
            self._codec = self.learned.starting_from(self.priors, known.moved_RC)
        self._side, self._max_bytes = self._codec.side_information(known.last_RC), max_bytes

    def send(self, targets: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        own = {}
        for client, target_RC in targets.items():
            update = self.learned.layout.to_update(target_RC)
            payload, residual = encode_update(
                update, None, codec=self._codec, max_bytes=self._max_bytes, side=self._side
            )
            self.num_bytes = len(payload)
            own[client] = residual.target_RC - residual.error_RC
        return torch.stack([*own.values()]).sum(0), own


@dataclass
class LinearArm:
    """The linear code: the sum of the integers is decoded."""

    levels: int
    learned: LearnedCodec
    priors: Mapping[str, Prior]
    num_bytes: int = 0
    announced_bytes: int = 0
    _announced: Announcement | None = field(default=None)

    @property
    def name(self) -> str:
        return f"linear, {self.levels} levels"

    def begin(self, known: Known, num_clients: int, max_bytes: int) -> None:
        layout = self.learned.layout
        tables = self.learned.tables_from(self.priors, known.moved_RC)
        basis = Basis(layout, tables, principal_axes(known.last_RC, layout))
        terms, seed = Terms(num_clients, max_bytes, self.levels), f"round {known.number}".encode()
        announced = self._announced or announce_first(basis, terms, known.last_RC, seed)
        self.announced_bytes = len(announced.pack())
        self._code, self._is_first = LinearCode(basis, terms, announced, seed), True

    def send(self, targets: Mapping[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        code = self._code
        integers = {client: code.encode(target_RC, client) for client, target_RC in targets.items()}
        total_S = np.sum([*integers.values()], axis=0) % code.modulus
        self.num_bytes = len(code.pack(total_S))
        if self._is_first:  # the second time is for ``once`` alone
            self._announced, self._is_first = code.announce_next(total_S, [*targets]), False
        own = {client: code.decode_own(sent, client) for client, sent in integers.items()}
        return code.decode_sum(total_S, [*targets]), own


def follow(recording: Recording, arm: Arm, num_clients: int, rate: float) -> Row:
    """All rounds of a recording, of each its first so many clients."""
    layout = recording.layout
    budget = max_payload_bytes(rate, layout.num_parameters)
    numbers = sorted({update.round for update in recording.updates})
    residuals: dict[int, Tensor] = {}
    all_updates = all_decoded = torch.zeros(layout.rank, layout.num_columns)
    moved_RC: Tensor | None = None
    last_RC = [update for update in recording.updates if update.round == numbers[0]][-1].blocks_RC
    once, fed, left = [], [], []
    for number in numbers:
        updates = {u.client: u.blocks_RC for u in recording.updates if u.round == number}
        updates = dict([*updates.items()][:num_clients])
        targets = {c: u + FEEDBACK * residuals[c] if c in residuals else u for c, u in updates.items()}
        arm.begin(Known(number, last_RC, moved_RC), num_clients, budget)
        decoded_RC, own = arm.send(targets)
        fed.append(error_energy(targets, decoded_RC))
        once.append(error_energy(updates, arm.send(updates)[0]))
        residuals |= {client: target - own[client] for client, target in targets.items()}
        left = [float(residuals[c].norm() / u.norm()) for c, u in updates.items()]
        all_updates, all_decoded = all_updates + torch.stack([*updates.values()]).sum(0), all_decoded + decoded_RC
        last_RC = decoded_RC / num_clients
        moved_RC = last_RC if moved_RC is None else moved_RC + last_RC
    return Row(
        code=arm.name,
        clients=num_clients,
        bits_requested=rate,
        bits=8 * arm.num_bytes / layout.num_parameters,
        once=mean(once[1:]),
        fed=mean(fed[1:]),
        run=error_energy({0: all_updates}, all_decoded),
        residual=mean(left),
        announced_bytes=arm.announced_bytes,
    )


def error_energy(parts: Mapping[int, Tensor], decoded_RC: Tensor) -> float:
    """Of the decoded sum of these parts, over the energy of the sum."""
    sum_RC = torch.stack([*parts.values()]).sum(0)
    return squared_distance(sum_RC, decoded_RC) / inner_product(sum_RC, sum_RC)


def main() -> None:
    args = options().parse_args()
    torch.set_num_threads(args.threads)
    with ends_in_a_line():
        rates, levels = rates_of(args.bits), [int(text) for text in args.levels.split(",")]
        beside = rates if args.open_bits is None else rates_of(args.open_bits)
        recording = load_recording(args.updates)
        fewest = min(len([u for u in recording.updates if u.round == n]) for n in {u.round for u in recording.updates})
        num_clients = args.clients or fewest
        if not 1 <= num_clients <= fewest:
            raise ValueError(f"--clients {num_clients}: every round of the recording has 1 to {fewest}")
        learned = codec_of(load_artifact(args.artifact, "learned"), recording.layout)
        assert isinstance(learned, LearnedCodec)
        model = ModelSettings(path=args.model, sha256=args.sha256)
        priors = {} if args.model is None else priors_of(model, recording.layout)
        rows = []
        for rate in rates:
            arms: list[Arm] = [OpenArm(name, learned, priors) for name in OPEN if rate in beside]
            arms += [LinearArm(number, learned, priors) for number in levels]
            for arm in arms:
                rows.append(follow(recording, arm, num_clients, rate))
                print_row(rows[-1])
    print_table(rows)
    if args.json is not None:
        about = {"updates": args.updates.name, "num_parameters": recording.layout.num_parameters}
        rest = {"command": command_of(args), "made_with": provenance()}
        write_json({"rows": [asdict(row) for row in rows], **about, **rest}, args.json)


def command_of(args: argparse.Namespace) -> str:
    """What was asked for, files by name alone."""
    given = {"updates": args.updates.name, "model": args.model, "sha256": args.sha256, "clients": args.clients}
    given |= {"bits": args.bits, "open-bits": args.open_bits, "levels": args.levels}
    return " ".join(["python -m bench.linear_code", *(f"--{key} {value}" for key, value in given.items() if value)])


def options() -> argparse.ArgumentParser:
    parser = recording_parser(__doc__ or "")
    parser.add_argument("--model", help="the base model, for directions that are derived from it")
    parser.add_argument("--sha256", help="of the base model, where it is a package's file")
    parser.add_argument(
        "--clients", type=int, help="of a round, the first so many (default: as many as all rounds have)"
    )
    parser.add_argument("--open-bits", help="of --bits those at which the open codecs are measured, too (default: all)")
    parser.add_argument("--levels", default="3,7", help="levels of the linear code, odd")
    return parser


def print_row(row: Row) -> None:
    print(f"{row.bits_requested:g} {row.code}: {row.once:.3f} {row.fed:.3f} {row.run:.3f}", file=sys.stderr, flush=True)


def print_table(rows: list[Row]) -> None:
    table = Table(title=f"error energy of the sum of {rows[0].clients} clients, every byte of a client's counted")
    for column in ("bits asked", "code", "bits", "once", "fed", "run", "residual", "announced"):
        table.add_column(column, justify="left" if column == "code" else "right", no_wrap=True)
    for row in rows:
        shown = (f"{number:.3f}" for number in (row.bits, row.once, row.fed, row.run, row.residual))
        table.add_row(f"{row.bits_requested:g}", row.code, *shown, f"{row.announced_bytes:,} B")
    Console(width=100 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
