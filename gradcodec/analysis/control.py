"""Whether what is decoded depends on what was encoded, and what becomes of it when noise is added first.

An output that is the same for every input stays the same under any noise, so that robustness alone proves nothing: the
paper's networks pass it with an output that ignores the client (docs/negative-results.md). The control feeds the codec
another input of the same scales and asks how near its output still is to the update that was meant. Both are of the
codec alone (``Coding.codec_alone``): the gain beside a payload's codes keeps any output from adding energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.layout import Layout
from gradcodec.training.coding import Coding
from gradcodec.training.recording import Update

SIGMAS = (5e-5, 5e-4, 5e-3, 5e-2, 5e-1)
"""Standard deviations of the noise that the paper adds."""
READS = 0.05
"""Innovation cosine above which a codec is said to read its input; one that does not has 0."""


@dataclass(frozen=True)
class Control:
    """How far a codec's output depends on its input; sums over the updates.

    Attributes:
        own_error: of an update's own output, over its energy.
        shifted_error: of the output for the same update with each block's columns shifted by half its width.
        other_error: of the output for another client's update of the round; None: every round has a single client.
        innovation_cosine: between the change of the input by the shift and the change of the output. 1 if all of it
            comes through, 0 if the output does not depend on where a block's values lie.
    """

    codec: str
    own_error: float
    shifted_error: float
    other_error: float | None
    innovation_cosine: float

    @property
    def reads_input(self) -> bool:
        return self.innovation_cosine > READS


@dataclass(frozen=True)
class Noise:
    """White noise of deviation ``sigma`` added before encoding; sums over the updates, all over their energy.

    ``noise_energy`` is the noise's own, ``error`` that of the output against the update *without* noise: between the
    two lies what the codec takes out or adds. ``other_error`` is the control: the same for another client's noisy
    update.
    """

    codec: str
    sigma: float
    noise_energy: float
    error: float
    other_error: float | None


def control(coding: Coding, updates: Sequence[Update]) -> Control:
    """Encodes every update twice: as it is, and shifted."""
    energy = own_error = shifted_error = moved = answered = common = 0.0
    outputs: dict[tuple[int, int], Tensor] = {}
    for update in updates:
        shifted_RC = shifted(update.blocks_RC, coding.layout)
        own_RC, other_RC = (coding.codec_alone(x, update.round) for x in (update.blocks_RC, shifted_RC))
        outputs[update.round, update.client] = own_RC
        energy += inner_product(update.blocks_RC, update.blocks_RC)
        own_error += squared_distance(update.blocks_RC, own_RC)
        shifted_error += squared_distance(update.blocks_RC, other_RC)
        change_RC, answer_RC = update.blocks_RC - shifted_RC, own_RC - other_RC
        moved += inner_product(change_RC, change_RC)
        answered += inner_product(answer_RC, answer_RC)
        common += inner_product(change_RC, answer_RC)
    lengths = (moved * answered) ** 0.5
    energy = energy or 1.0
    return Control(
        coding.name,
        own_error / energy,
        shifted_error / energy,
        _error_of_others(updates, outputs),
        common / lengths if lengths > 0 else 0.0,
    )


def noise_before(coding: Coding, updates: Sequence[Update], sigmas: Sequence[float], seed: int = 0) -> list[Noise]:
    """A row for each deviation; the first is without noise."""
    rows = []
    for sigma in (0.0, *sigmas):
        generator = torch.Generator().manual_seed(seed)
        energy = added = error = 0.0
        outputs: dict[tuple[int, int], Tensor] = {}
        for update in updates:
            noise_N = torch.randn(coding.layout.num_parameters, generator=generator) * sigma
            noise_RC = coding.layout.unflatten(noise_N)
            decoded_RC = coding.codec_alone(update.blocks_RC + noise_RC, update.round)
            outputs[update.round, update.client] = decoded_RC
            energy += inner_product(update.blocks_RC, update.blocks_RC)
            added += inner_product(noise_RC, noise_RC)
            error += squared_distance(update.blocks_RC, decoded_RC)
        energy = energy or 1.0
        rows.append(Noise(coding.name, sigma, added / energy, error / energy, _error_of_others(updates, outputs)))
    return rows


def shifted(blocks_RC: Tensor, layout: Layout) -> Tensor:
    """Every block's columns rolled by half its width: the same values and scales in other places."""
    rolled_RC = torch.empty_like(blocks_RC)
    for block in layout.blocks:
        part = blocks_RC[:, block.start : block.stop]
        rolled_RC[:, block.start : block.stop] = part.roll(block.width // 2, dims=1)
    return rolled_RC


def _error_of_others(updates: Sequence[Update], outputs: dict[tuple[int, int], Tensor]) -> float | None:
    """Of the output for the next client of the same round, over the updates' energy."""
    energy = error = 0.0
    for update in updates:
        clients = [client for number, client in outputs if number == update.round]
        other = clients[(clients.index(update.client) + 1) % len(clients)]
        if other != update.client:
            energy += inner_product(update.blocks_RC, update.blocks_RC)
            error += squared_distance(update.blocks_RC, outputs[update.round, other])
    return error / energy if energy > 0 else None
