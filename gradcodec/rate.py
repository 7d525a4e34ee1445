"""Rate control: the fewest bytes that reach a signal-to-noise ratio, for every codec that has a rate.

Knows codecs and blocks; a budget in bytes is each codec's own affair (``Codec.encode``).
"""

from __future__ import annotations

import math

from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import BudgetError
from gradcodec.fidelity import fidelity
from gradcodec.frame import Codes

_CLOSE = 1.01
"""The search ends when one per cent of the bytes is all that it could save."""


def codes_for_snr(codec: Codec, target_RC: Tensor, snr_db: float, most_bytes: int, side: Tensor | None) -> Codes:
    """The cheapest codes whose reconstruction has at least this ratio of energy to error energy.

    Bisects the budget, so it encodes about ten times. If ``most_bytes`` do not reach the ratio, the codes take those.

    Args:
        codec: one that has a rate.
        target_RC: finite blocks.
        snr_db: in dB, greater than 0.
        most_bytes: upper bound of the codes' bytes.
        side: the side information of this round, or None.

    Raises:
        BudgetError: the codec makes no codes of ``most_bytes``.
    """
    best = codec.encode(target_RC, most_bytes, side)
    if not bool(target_RC.any()) or _snr(codec, best, target_RC, side) < snr_db:
        return best
    low, high = 1.0, float(sum(map(len, best)))
    while high > _CLOSE * low and high - low > 1:
        middle = math.sqrt(low * high)
        try:
            codes = codec.encode(target_RC, int(middle), side)
        except BudgetError:
            low = middle
            continue
        if _snr(codec, codes, target_RC, side) < snr_db:
            low = middle
        else:
            best, high = codes, middle
    return best


def _snr(codec: Codec, codes: Codes, target_RC: Tensor, side: Tensor | None) -> float:
    return fidelity(target_RC, codec.decode(codes, side).to(target_RC.device)).snr_db
