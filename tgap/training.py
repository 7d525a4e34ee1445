"""Recording -> trained codecs and their measured fidelity on updates that they were not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gradcodec.artifact import Artifact
from gradcodec.autoencoder.fit_learned import Sample, fit_learned
from gradcodec.autoencoder.resnet import fit_resnet
from gradcodec.codec import Codec
from gradcodec.exchange import decode_update, encode_update, max_payload_bytes
from gradcodec.fidelity import fidelity, gaussian_bound_cosine
from gradcodec.gauge import principal_axes
from tgap.recording import Recording, Update

Progress = Callable[[int, int, float], None]
CODECS = ("learned", "resnet", "resnet-literal", "cnn1d", "uformer")


@dataclass(frozen=True)
class Row:
    """One codec at one rate on one held-out part: means over its updates, every byte counted."""

    codec: str
    heldout: str
    bits_requested: float | None
    bits: float
    cosine: float
    snr_db: float
    gaussian_bound_cosine: float
    num_updates: int


def train_codec(
    name: str,
    recording: Recording,
    updates: Sequence[Update],
    provenance: dict[str, Any],
    *,
    steps: int,
    seed: int,
    progress: Progress,
) -> Artifact:
    """Trains one codec on these updates of the recording."""
    layout = recording.layout
    if name == "learned":
        sides = _sides(recording, partial(principal_axes, layout=layout))
        samples = [Sample(update.blocks_RC, sides[update.round]) for update in updates]
        tables = fit_learned(samples, layout, steps=steps, seed=seed, progress=progress)
        return Artifact("learned", tables.to_tensors(), {"codec": {}, "trained": provenance})
    architecture, _, literal = name.partition("-")
    blocks = [update.blocks_RC for update in updates]
    network = fit_resnet(
        blocks, layout, literal=bool(literal), architecture=architecture, steps=steps, seed=seed, progress=progress
    )
    settings = {"codec": {"layout": layout.id.hex(), "literal": bool(literal)}, "trained": provenance}
    return Artifact(architecture, network.state_dict(), settings)


def measure(
    name: str, codec: Codec, recording: Recording, heldout: dict[str, list[Update]], rates: Sequence[float | None]
) -> list[Row]:
    """Fidelity of single updates, each encoded to a payload and decoded again, without error feedback."""
    sides = _sides(recording, codec.side_information)
    rows: list[Row] = []
    for part, updates in heldout.items():
        for rate in rates:
            budget = None if rate is None else max_payload_bytes(rate, codec.layout.num_parameters)
            found, bits = [], 0.0
            for update in updates:
                target = codec.layout.to_update(update.blocks_RC)
                side = sides[update.round]
                payload, _ = encode_update(target, None, codec=codec, max_bytes=budget, side=side)
                decoded = decode_update(payload, codec=codec, side=side)
                found.append(fidelity(update.blocks_RC, codec.layout.to_blocks(decoded)))
                bits += 8 * len(payload) / codec.layout.num_parameters / len(updates)
            mean_cosine = sum(f.cosine for f in found) / len(found)
            mean_snr = sum(f.snr_db for f in found) / len(found)
            rows.append(Row(name, part, rate, bits, mean_cosine, mean_snr, gaussian_bound_cosine(bits), len(found)))
    return rows


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _sides(recording: Recording, side_information: Callable[[Tensor], Tensor | None]) -> dict[int, Tensor | None]:
    """Per round what the codec may know of it: side information from the global update of the round before."""
    sides: dict[int, Tensor | None] = {}
    for number in {update.round for update in recording.updates}:
        before = recording.mean_of_round(number - 1)
        sides[number] = None if before is None else side_information(before)
    return sides
