"""The two halves of a transfer, side by side: update -> payload on the client, payload -> update on the server.

What is sent is the *target*: the new update plus what earlier payloads left out (error feedback: Seide et al. 2014,
Karimireddy et al. 2019). Every payload is contractive, ``|target - decoded| <= |target|``, whatever the codec's
weights: the encoder decodes its own codes and sends a gain, which is 1 unless the codes alone would add energy.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.codec import Codec, Reconstructs
from gradcodec.errors import BudgetError, CodecError, DivergedError
from gradcodec.fidelity import inner_product, squared_distance
from gradcodec.frame import HEADER_BYTES, Frame, pack, unpack
from gradcodec.rate import codes_for_snr


@dataclass(frozen=True)
class Residual:
    """What one payload left on the client, as blocks ``[R, C]`` float32.

    ``target`` is what should have been sent, ``error`` the residual proper, the part of it that the payload does not
    carry; which of the two goes on depends on whether the server accepted the payload. Both lie on the update's device.
    """

    target_RC: Tensor
    error_RC: Tensor
    payload_digest: str

    def carried(self, accepted_digest: str, decay: float) -> Tensor:
        """What the next target adds, ``[R, C]``: ``decay`` times the residual, or, if the server did not accept
        this payload (lost, refused or late), the whole target, so that no part of an update is lost."""
        return self.error_RC * decay if accepted_digest == self.payload_digest else self.target_RC


def digest_of(payload: bytes) -> str:
    """16 hexadecimal digits by which both ends call a payload."""
    return hashlib.sha256(payload).hexdigest()[:16]


def max_payload_bytes(bits_per_parameter: float, num_parameters: int) -> int:
    """The byte budget of a whole payload, its header included."""
    return int(bits_per_parameter * num_parameters / 8)


def encode_update(
    update: Mapping[str, Tensor],
    carried_RC: Tensor | None,
    *,
    codec: Codec,
    max_bytes: int | None = None,
    snr_db: float | None = None,
    side: Tensor | None = None,
    context: bytes = b"",
) -> tuple[bytes, Residual]:
    """Update -> payload and residual; ``error + decoded == target`` (conservation, to float32 rounding).

    Args:
        update: PEFT tensor name -> tensor; what local training changed.
        carried_RC: what earlier payloads left, ``Residual.carried``, or None.
        codec: built for the update's layout.
        max_bytes: upper bound of ``len(payload)``; None leaves the rate to the codec. Codecs of one rate ignore it.
        snr_db: with it the payload is the cheapest that reaches this ratio of the target's energy to the error's, in
            dB, as far as ``max_bytes``, which is then needed, allow.
        side: ``Codec.side_information`` of this round, equal on both ends, or None.
        context: what the receiver knows of this payload (``frame.py``); it refuses the payload in any other.

    Raises:
        CodecError: the update does not fit the layout, is not finite, or is beyond what the codec serves.
        BudgetError: no payload of ``max_bytes`` can be made.
    """
    target_RC = codec.layout.to_blocks(update)
    if carried_RC is not None:
        target_RC += carried_RC.to(target_RC.device)
    if not all(map(math.isfinite, map(float, torch.aminmax(target_RC)))):  # NaN comes through
        raise DivergedError("the update holds NaN or infinity: training diverged")
    if max_bytes is not None and max_bytes <= HEADER_BYTES:
        raise BudgetError(f"{max_bytes} bytes a payload: the frame's header alone takes {HEADER_BYTES}")
    most_bytes = None if max_bytes is None else max_bytes - HEADER_BYTES
    if snr_db is None and isinstance(codec, Reconstructs):
        codes, decoded_RC = codec.encode_with_decoded(target_RC, most_bytes, side)
    elif snr_db is None:
        codes = codec.encode(target_RC, most_bytes, side)
        decoded_RC = codec.decode(codes, side)
    else:
        assert most_bytes is not None
        codes = codes_for_snr(codec, target_RC, snr_db, most_bytes, side)
        decoded_RC = codec.decode(codes, side)
    decoded_RC = decoded_RC.to(target_RC.device)
    gain = contractive_gain(target_RC, decoded_RC)
    payload = pack(Frame(codec.id, codec.layout.id, gain, codes), context)
    error_RC = target_RC - _scaled(decoded_RC, gain)
    return payload, Residual(target_RC, error_RC, digest_of(payload))


def decode_update(
    payload: bytes, *, codec: Codec, side: Tensor | None = None, context: bytes = b""
) -> dict[str, Tensor]:
    """Payload -> update, float32 on the codec's device. It decodes, or raises ``CodecError``, never anything else.

    Args:
        payload: as received; nothing is taken on trust.
        codec: equal to the sender's.
        side: what the sender encoded with.
        context: the sender's.
    """
    return codec.layout.to_update(decode_blocks(payload, codec=codec, side=side, context=context))


def decode_blocks(payload: bytes, *, codec: Codec, side: Tensor | None = None, context: bytes = b"") -> Tensor:
    """The same as blocks ``[R, C]``."""
    frame = unpack(payload, codec.num_streams, context)
    if frame.codec_id != codec.id:
        raise CodecError(
            f"payload of codec {frame.codec_id.hex()}, this side has {codec.id.hex()}: "
            "both ends need the same codec artifact and settings and, where directions are derived, the same base model"
        )
    if frame.layout_id != codec.layout.id:
        raise CodecError(
            f"payload for layout {frame.layout_id.hex()}, this side has {codec.layout.id.hex()}: "
            "both ends need the same model, rank and target modules"
        )
    decoded_RC = _scaled(codec.decode(frame.codes, side), frame.gain)
    if not math.isfinite(inner_product(decoded_RC, decoded_RC)):  # torch.isfinite takes another update's memory
        raise CodecError("the payload decodes to NaN or infinity")
    return decoded_RC


def contractive_gain(target_RC: Tensor, decoded_RC: Tensor) -> float:
    """1 if the decoded blocks are no farther from the target than zero is; else the least-squares gain, rounded
    towards zero to float16; else 0."""
    energy = inner_product(target_RC, target_RC)

    def adds_energy(gain: float) -> bool:
        return not squared_distance(target_RC, decoded_RC, gain) <= energy

    if not adds_energy(1.0):
        return 1.0
    if not bool(torch.isfinite(decoded_RC).all()):
        return 0.0
    least_squares = inner_product(target_RC, decoded_RC) / max(
        inner_product(decoded_RC, decoded_RC), sys.float_info.min
    )
    gain = float(torch.tensor(min(max(least_squares, 0.0), 60000.0)).mul(0.999).half())
    return 0.0 if adds_energy(gain) else gain


def _scaled(decoded_RC: Tensor, gain: float) -> Tensor:
    if gain == 0.0:  # also of NaN and infinity
        return torch.zeros_like(decoded_RC)
    return decoded_RC if gain == 1.0 else decoded_RC * gain
