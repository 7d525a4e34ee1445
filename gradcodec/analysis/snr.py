"""Signal-to-noise ratio by layer, LoRA factor and round, in dB and as the paper defines it.

The standard ratio is ``10 log10(|g|^2 / |g - d|^2)``, g the update and d what is decoded. The paper's (arXiv
2405.13746) sets the summed square of the update against the *mean* square of the error, so that it grows with the
number of values: it is ``10 log10 n`` dB higher for n of them, 69 dB for a LLaMA-7B adapter, whatever the codec does.
An output of nothing but zeros has 0 dB by the first, and 69 by the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradcodec.analysis.places import factor_of, layer_of
from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.training.coding import Coding
from gradcodec.training.recording import Update


@dataclass(frozen=True)
class Snr:
    """One codec in one place: energies are sums over the clients of a round, ``num_values`` those of one update.

    ``layer`` is None for tensors without a number, and ``factor`` ``A``, ``B`` or ``vector``; both are ``all`` in the
    row of the whole update.
    """

    codec: str
    round: int
    layer: int | str | None
    factor: str
    num_values: int
    energy: float
    error_energy: float

    @property
    def snr_db(self) -> float | None:
        """None where there is no signal, or no error."""
        return decibels(self.energy, self.error_energy)

    @property
    def paper_snr_db(self) -> float | None:
        """As the paper has it."""
        return decibels(self.energy, self.error_energy / self.num_values)


def decibels(energy: float, error_energy: float) -> float | None:
    """Their ratio; None where one of them is zero."""
    return 10 * math.log10(energy / error_energy) if energy > 0 and error_energy > 0 else None


def snr_by_place(coding: Coding, updates: Sequence[Update]) -> list[Snr]:
    """Rows by round, layer and factor, and one for each whole round; ``updates`` are coded once each."""
    sums: dict[tuple[int, int | str | None, str], list[float]] = {}
    sizes: dict[tuple[int | str | None, str], int] = {}
    places = [(block, layer_of(block), factor_of(block)) for block in coding.layout.blocks]
    for block, layer, factor in places:
        for place in ((layer, factor), ("all", "all")):
            sizes[place] = sizes.get(place, 0) + block.size
    for update in updates:
        decoded_RC = coding.through(update.blocks_RC, update.round)
        for block, layer, factor in places:
            part, arrived = (all_RC[:, block.start : block.stop] for all_RC in (update.blocks_RC, decoded_RC))
            energy, error = inner_product(part, part), squared_distance(part, arrived)
            for key in ((update.round, layer, factor), (update.round, "all", "all")):
                so_far = sums.setdefault(key, [0.0, 0.0])
                so_far[0] += energy
                so_far[1] += error
    return [
        Snr(coding.name, number, layer, factor, sizes[layer, factor], energy, error)
        for (number, layer, factor), (energy, error) in sums.items()
    ]
