"""Robust rules: what to make of a round's updates when some of them may be an attacker's.

Two kinds. Rules of *distance* (Krum, Multi-Krum, centred clipping, geometric median, FLTrust) only ask how the updates
lie to each other, so they are functions of the Gram matrix that give weights; rules of *coordinates* (median, trimmed
mean, the second half of Bulyan) look at one value of all updates at a time. Both go through the updates in slices of
``SLICE`` values, in float64: no temporary of N x N x D nor a second copy of N x D is ever made. Knows tensors alone;
must not know Flower, settings or rounds. How many examples an update says to be made of counts for nothing here: it is
the sender's own word.

Shapes: N updates, D values, B values of a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

SLICE = 1 << 16
"""Values of every update that are looked at together: 0.5 MB an update in float64."""
WEISZFELD_STEPS = 32
SMOOTHING = 1e-6
"""No distance counts as shorter than this share of the median norm: the paper's nu, made relative."""
CLIPPING_STEPS = 3


def gram(updates: Sequence[Tensor]) -> Tensor:
    """Inner products ``[N, N]`` float64 of N updates ``[D]``."""
    products_NN = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for slice_NB in _slices(updates):
        products_NN += slice_NB @ slice_NB.T
    return products_NN


def squared_distances(gram_NN: Tensor) -> Tensor:
    """``[N, N]`` float64, at least 0, the diagonal 0. Of updates and not of adapters: where what is common to all is
    far longer than what differs, the difference of such sums is rounding."""
    norms_N = gram_NN.diagonal()
    return (norms_N[:, None] + norms_N[None, :] - 2 * gram_NN).clamp(min=0).fill_diagonal_(0)


def combined(updates: Sequence[Tensor], weights_N: Tensor) -> Tensor:
    """The sum of weighted updates, ``[D]`` float32."""
    return torch.cat([(weights_N @ slice_NB).float() for slice_NB in _slices(updates)])


def krum_order(gram_NN: Tensor, num_neighbours: int) -> list[int]:
    """Updates by Krum's score, the best first: the sum of squared distances to so many nearest others (Blanchard et
    al. 2017, section 4, where they are n - f - 2). Of equal scores the first update is the better."""
    distances_NN = squared_distances(gram_NN).fill_diagonal_(float("inf"))
    scores_N = distances_NN.sort(dim=1).values[:, :num_neighbours].sum(dim=1)
    return scores_N.argsort(stable=True).tolist()


def krum(gram_NN: Tensor, num_malicious: int) -> Tensor:
    """Weights ``[N]``: the update with the best score, and nothing else. Needs n >= 2f + 3."""
    return _mean_of(krum_order(gram_NN, len(gram_NN) - num_malicious - 2)[:1], len(gram_NN))


def multikrum(gram_NN: Tensor, num_malicious: int) -> Tensor:
    """Weights ``[N]``: the mean of the n - f updates with the best scores. Needs n >= 2f + 3."""
    n = len(gram_NN)
    return _mean_of(krum_order(gram_NN, n - num_malicious - 2)[: n - num_malicious], n)


def bulyan_selection(gram_NN: Tensor, num_malicious: int) -> list[int]:
    """The n - 2f updates that Krum chooses one after another, each among those that are left (El Mhamdi et al. 2018,
    algorithm 2), ascending. Needs n >= 4f + 3."""
    left, chosen = list(range(len(gram_NN))), list[int]()
    while len(chosen) < len(gram_NN) - 2 * num_malicious:
        among_NN = gram_NN[left][:, left]
        best = krum_order(among_NN, max(1, len(left) - num_malicious - 2))[0]
        chosen.append(left.pop(best))
    return sorted(chosen)


def bulyan(updates: Sequence[Tensor], num_malicious: int) -> Tensor:
    """Of the ``bulyan_selection`` in every coordinate the mean of the n - 4f values nearest to their median, ``[D]``
    float32. Needs n >= 4f + 3."""
    chosen = [updates[i] for i in bulyan_selection(gram(updates), num_malicious)]
    count = len(chosen) - 2 * num_malicious

    def near(slice_NB: Tensor) -> Tensor:
        nearest = (slice_NB - _median_of(slice_NB)).abs().sort(dim=0, stable=True).indices[:count]
        return slice_NB.gather(0, nearest).mean(dim=0)

    return _by_coordinate(chosen, near)


def median(updates: Sequence[Tensor]) -> Tensor:
    """In every coordinate the middle value, or the mean of the middle two; ``[D]`` float32 (Yin et al. 2018)."""
    return _by_coordinate(updates, _median_of)


def trimmed_mean(updates: Sequence[Tensor], num_malicious: int) -> Tensor:
    """In every coordinate the mean without the f largest and the f smallest values; ``[D]`` float32 (Yin et al. 2018).
    Needs n > 2f."""
    f = num_malicious
    return _by_coordinate(updates, lambda slice_NB: slice_NB.sort(dim=0).values[f : len(slice_NB) - f].mean(dim=0))


def geometric_median(gram_NN: Tensor, steps: int = WEISZFELD_STEPS, smoothing: float = SMOOTHING) -> Tensor:
    """Weights ``[N]`` of the geometric median, by smoothed Weiszfeld steps from the mean (RFA: Pillutla, Kakade,
    Harchaoui 2022, algorithm 2). What is sought is always a mean of the updates, so its distances to them follow from
    the Gram matrix, and the updates are not looked at. Half of the weight withstands any outliers."""
    least = max(smoothing * float(gram_NN.diagonal().sqrt().quantile(0.5)), 1e-300)
    weights_N = torch.full((len(gram_NN),), 1 / len(gram_NN), dtype=torch.float64)
    for _ in range(steps):
        distances_N = _distances_to(gram_NN, weights_N).clamp(min=least)
        weights_N = (1 / distances_N) / (1 / distances_N).sum()
    return weights_N


def centred_clip(gram_NN: Tensor, radius: float | None, steps: int = CLIPPING_STEPS) -> Tensor:
    """Weights ``[N]`` of centred clipping (Karimireddy, He, Jaggi 2021, algorithm 2) for updates from which the centre
    has been taken away: ``centre + combined(...)`` is what it comes to. In every step the centre moves by the mean of
    the differences to it, none longer than ``radius``.

    Without a radius it is the median distance to the centre, anew in every step: the paper's is absolute and in
    proportion to the honest spread, which nobody knows beforehand.
    """
    n = len(gram_NN)
    weights_N = torch.zeros(n, dtype=torch.float64)
    for _ in range(steps):
        distances_N = _distances_to(gram_NN, weights_N)
        most = float(distances_N.quantile(0.5)) if radius is None else radius
        share_N = (most / distances_N.clamp(min=1e-300)).clamp(max=1) / n
        weights_N = weights_N * (1 - share_N.sum()) + share_N
    return weights_N


def trust(gram_NN: Tensor) -> Tensor | None:
    """Weights ``[N]`` of FLTrust (Cao et al. 2021, section 4), the last update being the server's own: the positive
    part of the cosine with it, as shares, and every update scaled to its norm. None: no update has anything in common
    with it."""
    norms_N = gram_NN.diagonal().sqrt()
    cosines_N = gram_NN[-1] / (norms_N * norms_N[-1]).clamp(min=1e-300)
    scores_N = cosines_N[:-1].clamp(min=0)
    if not float(scores_N.sum()) > 0:
        return None
    scaled_N = scores_N / scores_N.sum() * norms_N[-1] / norms_N[:-1].clamp(min=1e-300)
    return torch.cat([scaled_N, scaled_N.new_zeros(1)])


def _distances_to(gram_NN: Tensor, weights_N: Tensor) -> Tensor:
    """Of every update to the sum of weighted updates, ``[N]``."""
    along_N = gram_NN @ weights_N
    return (gram_NN.diagonal() - 2 * along_N + weights_N @ along_N).clamp(min=0).sqrt()


def _mean_of(chosen: Sequence[int], n: int) -> Tensor:
    weights_N = torch.zeros(n, dtype=torch.float64)
    weights_N[list(chosen)] = 1 / len(chosen)
    return weights_N


def _median_of(slice_NB: Tensor) -> Tensor:
    sorted_NB, n = slice_NB.sort(dim=0).values, len(slice_NB)
    return (sorted_NB[(n - 1) // 2] + sorted_NB[n // 2]) / 2


def _by_coordinate(updates: Sequence[Tensor], rule: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([rule(slice_NB).float() for slice_NB in _slices(updates)])


def _slices(updates: Sequence[Tensor]) -> Iterator[Tensor]:
    """The updates ``[N, B]`` float64, a slice at a time."""
    for start in range(0, len(updates[0]), SLICE):
        yield torch.stack([update[start : start + SLICE].double() for update in updates])
