"""``projection``: the update's coordinates in a random subspace that both ends draw from a seed.

Shuai et al. 2024, "Ferret: Federated Full-Parameter Tuning at Scale for Large Language Models", and FedLoRU's and
others' relatives: clients send what their update has along shared random directions, and the server adds these up. Here
the directions are the first rows of a randomised Hadamard transform, so orthonormal, and each coordinate takes two
bytes.

    offset  size  field
    0       4     seed of the directions, from the values themselves: other ones in every round, so that error feedback
                  reaches all of them
    4       -     coordinates: bfloat16

Departures, in its favour: orthonormal directions instead of Gaussian ones, and no unbiased scale, so that it stays
contractive under error feedback.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.codec import WithoutSideInformation, bfloats_of, bfloats_to_bytes, codec_id
from gradcodec.errors import BudgetError, CodecError
from gradcodec.frame import Codes
from gradcodec.layout import Layout
from gradcodec.peers.eden import rotate_randomly, unrotate_randomly
from gradcodec.peers.packing import budget_of, finite

_SEED = struct.Struct("<I")


@dataclass(frozen=True)
class ProjectionCodec(WithoutSideInformation):
    """``projection``: any rate up to 16 bits."""

    layout: Layout
    id: bytes = codec_id("projection/1")
    num_streams: int = 1

    def encode(self, blocks_RC: Tensor, max_bytes: int | None, side: Tensor | None) -> Codes:
        room = budget_of(max_bytes, self.layout.num_parameters) - _SEED.size
        if room < 2:
            raise BudgetError(f"{room + _SEED.size} bytes for the codes; projection needs at least {_SEED.size + 2}")
        values = self.layout.flatten(blocks_RC).cpu().contiguous()
        seed = zlib.crc32(values.numpy().tobytes())
        return (_SEED.pack(seed) + bfloats_to_bytes(rotate_randomly(values, seed)[: room // 2]),)

    def decode(self, codes: Codes, side: Tensor | None) -> Tensor:
        data, num = codes[0], self.layout.num_parameters
        count, odd = divmod(len(data) - _SEED.size, 2)
        if odd or not 0 < count <= num:
            raise CodecError(f"{len(data)} bytes of codes for {num} parameters")
        (seed,) = _SEED.unpack_from(data)
        coordinates = torch.zeros(num)
        coordinates[:count] = bfloats_of(data[_SEED.size :])
        finite(coordinates.numpy())
        values = unrotate_randomly(coordinates, seed)
        finite(values.numpy())
        return self.layout.unflatten(values)
