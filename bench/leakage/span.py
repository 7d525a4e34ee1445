"""Which tokens a client's update was made of: what the first layer read lies in the span of A's gradient.

A LoRA layer adds ``s B A x`` to its output; the gradient of A is ``s B' (sum of d x')``, so that each of its rows is a
weighted sum of the layer's inputs ``x``, as long as B is not zero. In the first layer of a relative of LLaMA an input
is the normed embedding of a token, wherever it stands, so that every token of the vocabulary can be tried alone. q, k
and v read the same inputs: three times the rank rows.

Two attacks. The *span check* of DAGER (Petrov et al. 2024, section 4): how much of a token's input lies in the rows'
span; exact where the rank is at least the number of tokens. *Sparse recovery* goes on where it is not: the rows are
sums of few out of many known inputs (rank-aware order recursive matching pursuit: Davies and Eldar 2012).

Shape suffixes: K rows, D width of the layer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from bench.leakage.scores import f1_of

READERS = ("q_proj", "k_proj", "v_proj")
RIDGES = (1e-13, 1e-2, 1e-1)
"""What part of the strongest row's energy is taken for noise; which one, the attacker's own updates say. The
first is float32's own rounding."""
MOST_TOKENS = 128
SHORTLIST = 4096
"""So many tokens, by their span, sparse recovery looks at."""
_FLOOR = 0.1
"""Of what is left of the rows, the part of their mean energy below which a direction is noise."""
_ALONE = 1e-2
"""A token of which less than this lies outside the tokens that are taken already is not told from them."""


def rows_of(update: Mapping[str, Tensor], layer: int) -> Tensor:
    """The gradients of A of what reads a layer's inputs, ``[K, D]`` float64."""
    places = [f".layers.{layer}.self_attn.{reader}.lora_A." for reader in READERS]
    found = [tensor for place in places for name, tensor in update.items() if place in name]
    return torch.cat(found).double()


@torch.no_grad()
def dictionary_of(model: PeftModel) -> Tensor:
    """What the first layer reads at each token of the vocabulary, of length 1, ``[V, D]`` float32."""
    decoder = model.get_base_model().model
    inputs_VD: Tensor = decoder.layers[0].input_layernorm(decoder.embed_tokens.weight).float()
    return torch.nn.functional.normalize(inputs_VD)


class Coordinates:
    """In which a token is best told from the others behind a channel: along every principal direction of the
    vocabulary, what comes through of a row, over what is there at all.

    Where nothing is lost, the vocabulary has no direction in common in them, and a span stays a span.
    """

    def __init__(self, dictionary_VD: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """``pairs``: rows as they were and as they were seen, ``[K, D]`` each, of the attacker's own updates."""
        gram_DD = (dictionary_VD.T @ dictionary_VD).double() / len(dictionary_VD)
        self._axes_DD = torch.linalg.eigh(gram_DD)[1]
        sent_ND, seen_ND = (torch.cat([_unit(pair[which]) @ self._axes_DD for pair in pairs]) for which in (0, 1))
        sent_D, seen_D = sent_ND.square().mean(0), seen_ND.square().mean(0)
        gains_D = ((sent_ND * seen_ND).mean(0) / sent_D.clamp_min(1e-12)).clamp_min(0)
        self._roots_D = (seen_D + 1e-3 * seen_D.mean()).rsqrt()
        inputs_VD = dictionary_VD @ (self._axes_DD * (gains_D * self._roots_D)).float()
        self.inputs_VD = torch.nn.functional.normalize(inputs_VD)

    def rows(self, rows_KD: Tensor) -> Tensor:
        """Rows as they are seen, in these coordinates."""
        turned_KD: Tensor = rows_KD @ (self._axes_DD * self._roots_D)
        return turned_KD


def _unit(rows_KD: Tensor) -> Tensor:
    unit_KD: Tensor = rows_KD / rows_KD.norm().clamp_min(1e-30)
    return unit_KD


def span_scores(rows_KD: Tensor, inputs_VD: Tensor, ridge: float) -> Tensor:
    """How much of each input, of length 1, lies in the rows' span, ``[V]`` from 0 to 1; rows fainter than ``ridge`` of
    the strongest count for little."""
    values_K, axes_KD = _axes(rows_KD)
    if not float(values_K.max()) > 0:
        return torch.zeros(len(inputs_VD))
    weights_K = values_K / (values_K + ridge * values_K.max())
    return (inputs_VD @ axes_KD.T.to(inputs_VD.dtype)).square() @ weights_K.to(inputs_VD.dtype)


def sparse_scores(rows_KD: Tensor, inputs_VD: Tensor, ridge: float) -> Tensor:
    """Tokens one by one, each the one that most of what is still unexplained of the rows points at; ``[V]`` from 0 to
    1: the share of the rows that was unexplained when a token was taken, 0 if it was not."""
    scores_V = torch.zeros(len(inputs_VD))
    values_K, axes_KD = _axes(rows_KD)
    if not float(values_K.max()) > 0:
        return scores_V
    left_KD = (axes_KD * (values_K / (values_K + ridge * values_K.max())).sqrt()[:, None]).to(inputs_VD.dtype)
    shortlist = span_scores(rows_KD, inputs_VD, RIDGES[0]).topk(min(SHORTLIST, len(inputs_VD))).indices
    atoms_VD, whole = inputs_VD[shortlist], float(left_KD.square().sum())
    along_VK, lengths_V = atoms_VD @ left_KD.T, torch.ones(len(atoms_VD))
    chosen_ND, free_V = atoms_VD[:0], torch.ones(len(atoms_VD), dtype=torch.bool)
    for _ in range(min(MOST_TOKENS, *atoms_VD.shape) - 1):
        share = float(left_KD.square().sum()) / whole
        if share < 1e-6:
            break
        gains_V = _pointed_at(left_KD, along_VK) / lengths_V.clamp_min(_ALONE)
        best = int(gains_V.where(free_V, -1.0).argmax())
        free_V[best], scores_V[shortlist[best]] = False, share
        direction_D = atoms_VD[best] - chosen_ND.T @ (chosen_ND @ atoms_VD[best])
        direction_D /= direction_D.norm().clamp_min(1e-9)
        chosen_ND = torch.cat([chosen_ND, direction_D[None]])
        part_K, along_V = left_KD @ direction_D, atoms_VD @ direction_D
        left_KD = left_KD - part_K[:, None] * direction_D
        along_VK = along_VK - along_V[:, None] * part_K
        lengths_V = lengths_V - along_V.square()
    return scores_V


def _pointed_at(left_KD: Tensor, along_VK: Tensor) -> Tensor:
    """How much of each token lies in the span of what is left, ``[V]``."""
    gram_KK = (left_KD @ left_KD.T).double()
    floor = _FLOOR * float(gram_KK.diagonal().mean())
    inverse_KK = torch.linalg.inv(gram_KK + floor * torch.eye(len(gram_KK))).to(along_VK.dtype)
    pointed_V: Tensor = ((along_VK @ inverse_KK) * along_VK).sum(1)
    return pointed_V


def _axes(rows_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Energies ``[K]`` and orthonormal axes ``[K, D]`` of rows."""
    _, values_K, axes_KD = torch.linalg.svd(rows_KD.double(), full_matrices=False)
    return values_K.square(), axes_KD


Scorer = Callable[[Tensor, Tensor, float], Tensor]
ATTACKS: Mapping[str, Scorer] = {"span check": span_scores, "sparse recovery": sparse_scores}


@dataclass(frozen=True)
class Known:
    """An update of the attacker's own: the first layer's rows as they were and as they were seen, and its tokens."""

    sent_KD: Tensor
    seen_KD: Tensor
    tokens: frozenset[int]


@dataclass(frozen=True)
class Attack:
    """An attack behind one channel, its ridge and threshold set by what worked on the attacker's own updates."""

    scorer: Scorer
    coordinates: Coordinates
    ridge: float
    threshold: float

    def scores(self, seen_KD: Tensor) -> Tensor:
        """Of every token of the vocabulary, ``[V]``."""
        return self.scorer(self.coordinates.rows(seen_KD), self.coordinates.inputs_VD, self.ridge)

    def guess(self, seen_KD: Tensor) -> list[int]:
        """The tokens that it holds for those of the update, the surest first."""
        return above(self.scores(seen_KD), self.threshold)


def calibrated(scorer: Scorer, dictionary_VD: Tensor, known: Sequence[Known]) -> Attack:
    """Coordinates from the even ones of its own updates, ridge and threshold from the odd ones, where it does not see
    what it was fitted to. At least two."""
    coordinates = Coordinates(dictionary_VD, [(one.sent_KD, one.seen_KD) for one in known[::2]])
    best = (-1.0, RIDGES[0], 1.0)
    for ridge in RIDGES:
        scored = [
            (scorer(coordinates.rows(one.seen_KD), coordinates.inputs_VD, ridge), one.tokens) for one in known[1::2]
        ]
        threshold, f1 = best_threshold(scored)
        best = max(best, (f1, ridge, threshold), key=lambda found: found[0])
    return Attack(scorer, coordinates, best[1], best[2])


def best_threshold(scored: Sequence[tuple[Tensor, frozenset[int]]]) -> tuple[float, float]:
    """The score from which on tokens are best taken, by the mean F1, and that F1."""
    values = torch.cat([scores_V.topk(min(4 * len(truth), len(scores_V))).values for scores_V, truth in scored])
    tried = values[values > 0].quantile(torch.linspace(0, 1, 60)) if bool((values > 0).any()) else values[:1]
    found = [
        (sum(f1_of(above(scores_V, float(value)), truth) for scores_V, truth in scored) / len(scored), float(value))
        for value in tried
    ]
    f1, threshold = max(found)
    return threshold, f1


def above(scores_V: Tensor, threshold: float) -> list[int]:
    """Tokens with at least this score, and more than none, the surest first; at most ``MOST_TOKENS``."""
    count = min(int(((scores_V >= threshold) & (scores_V > 0)).sum()), MOST_TOKENS)
    return [int(token) for token in scores_V.topk(count).indices]
