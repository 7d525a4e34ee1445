"""Recording -> trained codecs, and any codec's fidelity on updates that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.autoencoder.fit_learned import Sample, fit_learned
from gradcodec.autoencoder.resnet import fit_resnet
from gradcodec.codec import Codec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.fidelity import fidelity, gaussian_bound_cosine
from gradcodec.gauge import principal_axes
from gradcodec.recording import Recording, Update
from gradcodec.settings import FitSettings

Progress = Callable[[int, int, float], None]
"""Called with what is done, what there is to do, and the loss."""


@dataclass(frozen=True)
class Row:
    """One codec at one rate on one held-out part: means over its updates, every byte counted.

    ``aggregate_cosine`` is that of the mean over a round's clients, ``gaussian_bound_cosine`` the highest that any code
    of ``bits`` reaches on independent Gaussians.
    """

    codec: str
    heldout: str
    bits_requested: float | None
    bits: float
    cosine: float
    snr_db: float
    aggregate_cosine: float
    gaussian_bound_cosine: float
    num_updates: int

    @property
    def error_energy(self) -> float:
        """Of the error, over the update's: from 0 to 1."""
        return float(10 ** (-self.snr_db / 10))


def train_codec(
    name: str,
    recording: Recording,
    updates: Sequence[Update],
    provenance: dict[str, Any],
    *,
    settings: FitSettings,
    seed: int,
    progress: Progress,
) -> Artifact:
    """Trains one of ``TRAINABLE`` on these updates of the recording."""
    layout = recording.layout
    if name == "learned":
        sides = sides_of(recording)
        samples = [Sample(update.blocks_RC, sides[update.round]) for update in updates]
        tables = fit_learned(samples, layout, directions=settings.directions, passes=settings.passes, progress=progress)
        return Artifact("learned", tables.to_tensors(), {"codec": {}, "trained": provenance})
    architecture, _, literal = name.partition("-")
    blocks = [update.blocks_RC for update in updates]
    network = fit_resnet(
        blocks,
        layout,
        literal=bool(literal),
        architecture=architecture,
        steps=settings.network_steps,
        seed=seed,
        progress=progress,
    )
    head = {"codec": {"layout": layout.id.hex(), "literal": bool(literal)}, "trained": provenance}
    return Artifact(architecture, network.state_dict(), head)


def measure(
    name: str, codec: Codec, recording: Recording, heldout: dict[str, list[Update]], rates: Sequence[float | None]
) -> list[Row]:
    """Fidelity of single updates, each encoded to a payload and decoded again, without error feedback."""
    sides = sides_of(recording, codec.side_information)
    return [_measured(name, part, codec, updates, sides, rate) for part, updates in heldout.items() for rate in rates]


def _measured(
    name: str,
    part: str,
    codec: Codec,
    updates: Sequence[Update],
    sides: dict[int, Tensor | None],
    rate: float | None,
) -> Row:
    layout = codec.layout
    budget = None if rate is None else max_payload_bytes(rate, layout.num_parameters)
    found, num_bytes = [], 0
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for update in updates:
        side = sides[update.round]
        payload, _ = encode_update(layout.to_update(update.blocks_RC), None, codec=codec, max_bytes=budget, side=side)
        decoded_RC = layout.to_blocks(decode_update(payload, codec=codec, side=side))
        found.append(fidelity(update.blocks_RC, decoded_RC))
        num_bytes += len(payload)
        target_RC, before_RC = sums.get(update.round, (torch.zeros_like(decoded_RC), torch.zeros_like(decoded_RC)))
        sums[update.round] = (target_RC + update.blocks_RC, before_RC + decoded_RC)
    bits = 8 * num_bytes / layout.num_parameters / len(updates)
    return Row(
        codec=name,
        heldout=part,
        bits_requested=rate,
        bits=bits,
        cosine=mean(f.cosine for f in found),
        snr_db=mean(f.snr_db for f in found),
        aggregate_cosine=mean(fidelity(*pair).cosine for pair in sums.values()),
        gaussian_bound_cosine=gaussian_bound_cosine(bits),
        num_updates=len(found),
    )


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def sides_of(
    recording: Recording, side_information: Callable[[Tensor], Tensor | None] | None = None
) -> dict[int, Tensor | None]:
    """Per round what a codec may know of it: side information from the global update of the round before; without a
    function that of ``learned``, principal axes."""
    side_information = side_information or partial(principal_axes, layout=recording.layout)
    sides: dict[int, Tensor | None] = {}
    for number in {update.round for update in recording.updates}:
        before = recording.mean_of_round(number - 1)
        sides[number] = None if before is None else side_information(before)
    return sides
