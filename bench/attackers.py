"""What malicious clients send. Each knows everything that the honest ones of its round trained, and all send the same
but where they train themselves (``labels``, ``gain``).

They keep the rules of the wire: a payload of theirs goes through the codec, has a right checksum and decodes to finite
values. What is refused for its form alone is ``tests/test_bad_replies.py``. Knows updates, windows and frames; must not
know strategies.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from adapters.windows import Windows
from gradcodec.frame import Frame

Update = Mapping[str, Tensor]

ALIE_Z = 1.5
"""Standard deviations from the mean. Of ten with two malicious ones the paper's formula (Baruch et al. 2019, section 3)
gives 0, which is no attack; 1.5 is what implementations take."""
IPM_EPSILON = 0.5
"""Xie et al. 2020: minus so many means. A small one is no outlier."""
UNDER = 2.99
"""Usual norms: the next longer update is scaled (``strategy.clip_norm_ratio=3``)."""
STEP_OCTAVES = 20
GAIN = -2.9


@dataclass(frozen=True)
class Attack:
    """One kind of attacker. Without ``update`` it trains as honest ones do, on what ``poison`` makes of its data."""

    about: str
    update: Callable[[Sequence[Update]], Update] | None = None
    poison: Callable[[Windows, int], Windows] = lambda windows, vocabulary: windows
    forge: Callable[[Frame], Frame] = lambda frame: frame
    present: bool = True


def norm_of(update: Update) -> float:
    """L2, of all tensors."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def mean_of(updates: Sequence[Update]) -> dict[str, Tensor]:
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


def reversed_mean(honest: Sequence[Update], usual_norms: float) -> Update:
    """Against the honest mean, so many times as long as an honest update usually is."""
    mean = mean_of(honest)
    scale = usual_norms * median(map(norm_of, honest)) / max(norm_of(mean), 1e-30)
    return {name: -scale * tensor for name, tensor in mean.items()}


def a_little(honest: Sequence[Update]) -> Update:
    """A little is enough (Baruch et al. 2019): so near the mean in every coordinate that it lies among the honest."""
    mean = mean_of(honest)
    spread = {name: torch.stack([update[name] for update in honest]).std(0) for name in mean}
    return {name: tensor - ALIE_Z * spread[name] for name, tensor in mean.items()}


def wrong_targets(windows: Windows, vocabulary: int) -> Windows:
    """Every second token is the one half a vocabulary further, and these alone are learnt: label flipping."""
    odd_T = torch.arange(windows.ids.shape[1]) % 2 == 1
    return Windows(windows.ids.where(~odd_T, (windows.ids + vocabulary // 2) % vocabulary), windows.counted & odd_T)


def other_step(frame: Frame) -> Frame:
    """The same symbols of ``learned``, each a million times as large."""
    (codes,) = frame.codes
    (step,) = struct.unpack_from("<h", codes)
    return dataclasses.replace(frame, codes=(struct.pack("<h", step + 64 * STEP_OCTAVES) + codes[2:],))


ATTACKS = {
    "none": Attack("all ten are honest"),
    "sign": Attack("against the honest mean, of the usual length", lambda honest: reversed_mean(honest, 1.0)),
    "scaled": Attack("the same ten times as long", lambda honest: reversed_mean(honest, 10.0)),
    "under": Attack("the same just short of what is scaled down", lambda honest: reversed_mean(honest, UNDER)),
    "alie": Attack(f"the mean less {ALIE_Z} standard deviations in every coordinate", a_little),
    "ipm": Attack(
        f"minus {IPM_EPSILON} means",
        lambda honest: {name: -IPM_EPSILON * tensor for name, tensor in mean_of(honest).items()},
    ),
    "labels": Attack("trained on wrong next tokens", poison=wrong_targets),
    "mimic": Attack("what the first honest client sends, so that it counts three times", lambda honest: honest[0]),
    "gain": Attack("an honest payload with a gain of -2.9", forge=lambda frame: dataclasses.replace(frame, gain=GAIN)),
    "step": Attack(
        "against the honest mean, its symbols a million times as large by the codec's step",
        lambda honest: reversed_mean(honest, 1.0),
        forge=other_step,
    ),
}

ABSENT = Attack("the two take no part: what a perfect defence reaches", present=False)
