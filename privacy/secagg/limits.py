"""How many clients a sum takes, how many must stay, and what that is worth. Knows numbers alone."""

from __future__ import annotations

import math

from privacy.errors import PrivacyError
from privacy.settings import MIN_CLIENTS, PrivacySettings

MAX_CLIENTS = 128
"""Every client deals every other a share of every seed, n^2 in a reply, and the server expands a mask for every pair of
a client that stayed and one that went. Up to 64 clients that is small beside a million integers; 128 are the most that
are served. Beyond, a client would share masks with some of the others only (Bell et al., "Secure Single-Server
Aggregation with (Poly)Logarithmic Overhead", CCS 2020)."""
MIN_THRESHOLD = 2


def threshold_of(clients: int, share: float = 0.5) -> int:
    """The least number of ``clients`` that is more than this share of them, 0 <= share < 1; at least 2."""
    return max(MIN_THRESHOLD, math.floor(share * clients + 1e-9) + 1)


def least_stay(settings: PrivacySettings, clients: int, min_replies: int) -> int:
    """How many of the invited must stay to the end of a run's sum, which both ends know: with noise in the sum as many
    as share it, ``min_replies``."""
    least = threshold_of(clients, settings.threshold)
    return max(least, min_replies) if settings.noise == "sum" else least


def fewest_summed(threshold: int) -> int:
    """How many messages a sum holds at least."""
    return max(threshold, MIN_CLIENTS)


def check_numbers(clients: int, threshold: int) -> None:
    """Raises PrivacyError: a round of so many clients, so many of whom must stay, cannot be served."""
    if not MIN_CLIENTS <= clients <= MAX_CLIENTS:
        reason = "of fewer the sum gives one away" if clients < MIN_CLIENTS else "shares grow with their square"
        raise PrivacyError(
            f"secure aggregation of {clients} clients: it takes {MIN_CLIENTS} to {MAX_CLIENTS}, {reason}"
        )
    if not MIN_THRESHOLD <= threshold <= clients:
        raise PrivacyError(f"secure aggregation with threshold {threshold}: it lies from 2 to {clients}, the clients")


def smallest_sum(clients: int, threshold: int, colluders: int = 0, *, lies: bool = True) -> int:
    """The fewest honest clients whose sum a server can learn in a round together with ``colluders`` of the clients. 1
    says that it may learn what a single client sent.

    Args:
        clients: that were invited, n.
        threshold: t.
        colluders: clients that give the server all they know, c.
        lies: the server may tell every client that others dropped out. Else it keeps to the protocol and reads.

    The bound for a server that lies. Let h = n - c be honest, s = t - c of them needed to open a seed, and f the least
    size of a sum. Who opens the sum of a set G of honest clients needs, for every i in G and honest j outside, the self
    seed of i (s honest clients that were told "i is in") and the pair's seed: as i dealt it (s honest that were told "i
    is in, j is out") or as j did ("j is in, i is out"). If 2s > h the last cannot be had beside the first. An honest
    client answers once, and is told at most n - f honest clients that are out; so s |G| (h - |G|) <= h |G| (n - f), or
    |G| >= h (1 - (n - f) / s).
    """
    honest, needed = clients - colluders, threshold - colluders
    if needed <= 0:
        return 1
    if not lies:
        return max(1, fewest_summed(threshold) - colluders)
    if 2 * needed <= honest:
        return 1
    # in integers: h - floor(h (n - f) / s)
    return max(1, honest - honest * (clients - fewest_summed(threshold)) // needed)


def threshold_warning(clients: int, threshold: int) -> str | None:
    """What a threshold that was chosen does not protect against, as a sentence for logs; None: half or more must
    stay."""
    if 2 * threshold > clients:
        return None
    return (
        f"secure aggregation with a threshold of {threshold} of {clients} clients: a server that tells half of them "
        f"one story and half another opens single messages; it takes {threshold_of(clients)} to rule this out"
    )
