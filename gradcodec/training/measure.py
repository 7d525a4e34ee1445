"""Any codec's fidelity on recorded updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.fidelity import fidelity, gaussian_bound_cosine
from gradcodec.training.coding import Coding
from gradcodec.training.recording import Recording, Update


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


def measure(
    name: str,
    codec: Codec | Mapping[int, Codec],
    recording: Recording,
    heldout: dict[str, list[Update]],
    rates: Sequence[float | None],
) -> list[Row]:
    """Fidelity of single updates, each encoded to a payload and decoded again, without error feedback; ``codec`` may be
    one a round."""
    coding = Coding.of(name, codec, recording)
    return [_measured(replace(coding, bits=rate), part, updates) for part, updates in heldout.items() for rate in rates]


def _measured(coding: Coding, part: str, updates: Sequence[Update]) -> Row:
    layout, found, num_bytes = coding.layout, [], 0
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for update in updates:
        payload = coding.payload(update.blocks_RC, update.round)
        decoded_RC = coding.decoded(payload, update.round)
        found.append(fidelity(update.blocks_RC, decoded_RC))
        num_bytes += len(payload)
        target_RC, before_RC = sums.get(update.round, (torch.zeros_like(decoded_RC), torch.zeros_like(decoded_RC)))
        sums[update.round] = (target_RC + update.blocks_RC, before_RC + decoded_RC)
    bits = 8 * num_bytes / layout.num_parameters / len(updates)
    return Row(
        codec=coding.name,
        heldout=part,
        bits_requested=coding.bits,
        bits=bits,
        cosine=mean(f.cosine for f in found),
        snr_db=mean(f.snr_db for f in found),
        aggregate_cosine=mean(fidelity(*pair).cosine for pair in sums.values()),
        gaussian_bound_cosine=gaussian_bound_cosine(bits),
        num_updates=len(found),
    )


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON objects, a field each."""
    return [asdict(row) for row in rows]
