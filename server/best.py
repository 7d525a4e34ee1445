"""Which round was best, and whether waiting for a better one still pays: both read off the held-out losses alone.

So a resumed run comes to the same as one that was never cut. Knows numbers; must not know where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence


def best_round(losses: Sequence[float]) -> int:
    """The first round of the lowest loss; round 0 is what training began with.

    Args:
        losses: before the first round and after each, one at least.
    """
    return min(range(len(losses)), key=losses.__getitem__)


def rounds_in_vain(losses: Sequence[float], min_improvement: float) -> int:
    """How many rounds have passed since the last that improved on all before it (Prechelt 1998, "Early Stopping - But
    When?", with a least improvement).

    Args:
        losses: before the first round and after each, one at least.
        min_improvement: by how much a loss must lie below that of the last round which improved, in nats per token;
            with 0 it must lie below it at all.
    """
    last, reference = 0, losses[0]
    for server_round, loss in enumerate(losses):
        if loss < reference and reference - loss >= min_improvement:
            last, reference = server_round, loss
    return len(losses) - 1 - last


def enough(losses: Sequence[float], patience: int | None, min_improvement: float) -> str | None:
    """Why no further round is worth waiting for; None: one is.

    Args:
        losses: before the first round and after each, one at least.
        patience: after so many rounds in vain; None: always wait.
        min_improvement: as ``rounds_in_vain`` takes it.
    """
    if patience is None or rounds_in_vain(losses, min_improvement) < patience:
        return None
    least = f"by at least {min_improvement:g} " if min_improvement else ""
    return f"the held-out loss did not improve {least}in {patience} rounds (federation.patience={patience})"
