"""How much one client may add: the L2 norm of its update, beside the others' and beside the last rounds'.

Norm clipping (Sun et al. 2019, "Can You Really Backdoor Federated Learning?"): an update that is too long is scaled
down, which keeps an honest client's direction; one that is longer by far is no honest client's and is refused. What is
too long is relative, as norms depend on model, learning rate and steps: ratios to a *reference*, the median of the
round's norms or of the last rounds'. Knows numbers only; must not know tensors or Flower.

``max_norm`` beside it is absolute: whoever knows how long an honest update is bounds what any other can add, from the
first round on and whatever the others send. A bound on norms is no cure for a node that sends a wrong direction of the
usual length: robust rules are (``robust.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low

from gradcodec.state import numbers_of

HISTORY_ROUNDS = 5
ENOUGH = 3
"""Of fewer norms a median says nothing: with two, one of them may be the attacker's."""


class NormBound:
    """Decides on every update of a round, given the norms that were seen first."""

    def __init__(self, clip_ratio: float | None, max_ratio: float | None, max_norm: float | None = None) -> None:
        """Ratios to the reference: an update beyond ``clip_ratio`` is scaled down to it, beyond ``max_ratio`` refused.
        One longer than ``max_norm`` is scaled down to that. None switches any of them off."""
        self.clip_ratio = clip_ratio
        self.max_ratio = max_ratio
        self.max_norm = max_norm
        self.medians: list[float] = []  # of what was added in each of the last rounds

    def reference(self, norms: Sequence[float]) -> float | None:
        """The usual norm: of ``norms``, the first of the round, if they are ``ENOUGH``, or of the last rounds,
        whichever is larger; None: nothing is known yet. Zeros say nothing.

        A round's own median counts for ``max_ratio`` times the past's at most: its clients may be few, and most of them
        an attacker's.
        """
        own = sorted(norm for norm in norms if norm > 0)
        past = median_low(self.medians) if self.medians else None
        if past is None:
            return median_low(own) if own else None
        if len(own) < ENOUGH:
            return past
        return max(past, min(median_low(own), past * (self.max_ratio or 1.0)))

    def scale(self, norm: float, reference: float | None) -> float | None:
        """What an update of this norm is multiplied by, 1 if it is no longer than allowed; None: it is refused."""
        longest = math.inf if self.max_norm is None else self.max_norm
        if reference is not None:
            if self.max_ratio is not None and norm > self.max_ratio * reference:
                return None
            if self.clip_ratio is not None:
                longest = min(longest, self.clip_ratio * reference)
        return longest / norm if norm > longest else 1.0

    def averaged(self, norms: Sequence[float]) -> None:
        """To be called after a round with the norms of what was added."""
        if own := sorted(norm for norm in norms if norm > 0):
            self.medians = [*self.medians, median_low(own)][-HISTORY_ROUNDS:]

    def state(self) -> list[float]:
        return list(self.medians)

    def load_state(self, state: object) -> None:
        """Inverse of ``state``. Raises ValueError: it is none."""
        self.medians = numbers_of(state)[-HISTORY_ROUNDS:]
