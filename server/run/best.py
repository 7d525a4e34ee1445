"""Which round was best, and whether waiting for a better one still pays: both read off the losses alone.

So a resumed run comes to the same as one that was never cut. Knows numbers; must not know where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping


def best_round(losses: Mapping[int, float]) -> int:
    """The first round of the lowest loss; round 0 is what training began with.

    Args:
        losses: round -> loss, ascending, of those that are known, one at least.
    """
    return min(losses, key=losses.__getitem__)


def rounds_in_vain(losses: Mapping[int, float], min_improvement: float) -> int:
    """How many rounds have passed since the last that improved on all before it (Prechelt 1998, "Early Stopping - But
    When?", with a least improvement). Rounds whose loss is not known pass, too.

    Args:
        losses: as ``best_round`` takes them.
        min_improvement: by how much a loss must lie below that of the last round which improved, in nats per token;
            with 0 it must lie below it at all.
    """
    last = next(iter(losses))
    for server_round, loss in losses.items():
        if loss < losses[last] and losses[last] - loss >= min_improvement:
            last = server_round
    return max(losses) - last


def enough(losses: Mapping[int, float], patience: int | None, min_improvement: float) -> str | None:
    """Why no further round is worth waiting for; None: one is.

    Args:
        losses: as ``best_round`` takes them, or none.
        patience: after so many rounds in vain; None: always wait.
        min_improvement: as ``rounds_in_vain`` takes it.
    """
    if patience is None or not losses or rounds_in_vain(losses, min_improvement) < patience:
        return None
    least = f"by at least {min_improvement:g} " if min_improvement else ""
    return f"the held-out loss did not improve {least}in {patience} rounds (federation.patience={patience})"
