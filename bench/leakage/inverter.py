"""An attacker that learns: from what it sees of an update to the tokens in it, trained through the channel.

Learning to Invert (Wu et al. 2023): the attacker makes updates from public text, sends them through the channel itself,
and trains a network on what comes out; noise and codes are then no surprise to it. A token's evidence is a scalar for
each of the channel's traces of it, the same function for all tokens; beside it a network sees a random projection of
the whole update. Knows updates; must not know channels.

Shape suffixes: N updates, V vocabulary, F traces of a token, P projections.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.leakage.scores import f1_of
from bench.leakage.span import RIDGES, Coordinates, above, best_threshold, rows_of, span_scores, sparse_scores

NUM_PROJECTIONS = 768
_HIDDEN, _STEPS, _LOOK, _BATCH, _LR = 256, 600, 20, 32, 2e-3

Update = Mapping[str, Tensor]
Traces = Callable[[Update], Tensor]
"""An update -> what speaks for each token, ``[F, V]``."""


class Projection:
    """A random projection of all of an update, the same for all, ``[P]``."""

    def __init__(self, num_parameters: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._places = torch.randint(NUM_PROJECTIONS, (num_parameters,), generator=generator)
        self._signs = torch.randint(2, (num_parameters,), generator=generator) * 2.0 - 1.0

    def __call__(self, update: Update) -> Tensor:
        """Of length 1: how long an update is says nothing of its tokens."""
        flat = torch.cat([update[name].flatten() for name in sorted(update)])
        sums_P = torch.zeros(NUM_PROJECTIONS).index_add(0, self._places, flat * self._signs)
        projected_P: Tensor = nn.functional.normalize(sums_P, dim=0) * NUM_PROJECTIONS**0.5
        return projected_P


class Network(nn.Module):
    """Traces and projections -> logits of the tokens, beside how frequent each is in public text."""

    def __init__(self, num_traces: int, prior_V: Tensor) -> None:
        super().__init__()
        self.prior_V = nn.Parameter(prior_V.clone())
        self.of_traces = nn.Sequential(nn.Linear(num_traces + 1, 32), nn.GELU(), nn.Linear(32, 1))
        last = nn.Linear(_HIDDEN, len(prior_V))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.of_all = nn.Sequential(nn.Linear(NUM_PROJECTIONS, _HIDDEN), nn.GELU(), nn.Dropout(0.2), last)

    def forward(self, traces_NFV: Tensor, projected_NP: Tensor) -> Tensor:
        """Logits ``[N, V]``."""
        prior_NV = self.prior_V.expand(len(traces_NFV), -1)
        each_NVF = torch.cat([traces_NFV.transpose(1, 2), prior_NV[:, :, None]], 2)
        logits_NV: Tensor = prior_NV + self.of_traces(each_NVF)[:, :, 0] + self.of_all(projected_NP)
        return logits_NV


class Inverter:
    """Trained on the attacker's own updates; the last fifth of them says when to stop, and sets the
    threshold."""

    def __init__(self, traces: Traces, projection: Projection, vocabulary: int) -> None:
        self._traces, self._projection, self._vocabulary = traces, projection, vocabulary

    def fit(self, seen: Sequence[Update], tokens: Sequence[frozenset[int]], seed: int = 0) -> float:
        """Trains, and gives the mean F1 on the fifth that it was not trained on."""
        torch.manual_seed(seed)
        traces_NFV, projected_NP = self._features(seen)
        truth_NV = torch.zeros(len(seen), self._vocabulary)
        for row_V, own in zip(truth_NV, tokens, strict=True):
            row_V[list(own)] = 1.0
        count = len(seen) - max(1, len(seen) // 5)
        frequency_V = (truth_NV[:count].sum(0) + 0.05) / (count + 1)
        self._network = Network(traces_NFV.shape[1], frequency_V.logit())
        few = [self._network.prior_V, *self._network.of_traces.parameters()]
        groups: list[dict[str, Any]] = [{"params": few}, {"params": self._network.of_all.parameters()}]
        optimizer = torch.optim.AdamW(groups, lr=_LR, weight_decay=1e-2)
        best, kept = math.inf, self._network.state_dict()
        for step in range(_STEPS):
            optimizer.param_groups[1]["lr"] = _LR if step >= _STEPS // 2 else 0.0  # it learns by heart what it can
            rows = torch.randint(count, (_BATCH,))
            loss = _loss(self._network(traces_NFV[rows], projected_NP[rows]), truth_NV[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % _LOOK == 0:
                judged = self._judged(traces_NFV[count:], projected_NP[count:], truth_NV[count:])
                if judged < best:
                    best, kept = judged, copy.deepcopy(self._network.state_dict())
        self._network.load_state_dict(kept)
        self._network.eval()
        scored = [(self.scores(one), own) for one, own in zip(seen[count:], tokens[count:], strict=True)]
        self._threshold, f1 = best_threshold(scored)
        return f1

    @torch.no_grad()
    def _judged(self, traces_NFV: Tensor, projected_NP: Tensor, truth_NV: Tensor) -> float:
        self._network.eval()
        loss = float(_loss(self._network(traces_NFV, projected_NP), truth_NV))
        self._network.train()
        return loss

    @torch.no_grad()
    def scores(self, seen: Update) -> Tensor:
        """How likely each token is among the update's, ``[V]``."""
        scores_NV: Tensor = self._network(*self._features([seen])).sigmoid()
        return scores_NV[0]

    def guess(self, seen: Update) -> list[int]:
        """The tokens that it holds for those of the update, the likeliest first."""
        return above(self.scores(seen), self._threshold)

    def _features(self, seen: Sequence[Update]) -> tuple[Tensor, Tensor]:
        traces_NFV = torch.stack([self._traces(one) for one in seen])
        spread = traces_NFV.std(2, keepdim=True).clamp_min(1e-9)
        traces_NFV = (traces_NFV - traces_NFV.mean(2, keepdim=True)) / spread
        return traces_NFV, torch.stack([self._projection(one) for one in seen])


def prior_guess(tokens: Sequence[frozenset[int]], vocabulary: int) -> list[int]:
    """What is guessed of an update without seeing it: the tokens that public updates hold most often, as many of them
    as give the best F1 there."""
    counts_V = torch.zeros(vocabulary)
    for own in tokens:
        counts_V[list(own)] += 1
    order = [int(token) for token in counts_V.argsort(descending=True, stable=True)]
    sizes = range(1, 2 * max(map(len, tokens)))
    return order[: max(sizes, key=lambda size: sum(f1_of(order[:size], own) for own in tokens))]


def _loss(logits_NV: Tensor, truth_NV: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits_NV, truth_NV)


class TokenTraces:
    """What of an update speaks for each token, ``[3, V]``: the first layer's rows, by their span and by sparse
    recovery, and the last layer's B, whose gradient lies where the labels' embeddings do."""

    def __init__(self, coordinates: Coordinates, embeddings_VD: Tensor, last_layer: int) -> None:
        self._coordinates, self._last_layer = coordinates, last_layer
        self._outputs_VD = nn.functional.normalize(embeddings_VD - embeddings_VD.mean(0))

    def __call__(self, update: Update) -> Tensor:
        rows_KD, inputs_VD = self._coordinates.rows(rows_of(update, 0)), self._coordinates.inputs_VD
        [written] = [
            one for name, one in update.items() if f".layers.{self._last_layer}.self_attn.o_proj.lora_B." in name
        ]
        return torch.stack(
            [
                span_scores(rows_KD, inputs_VD, RIDGES[-1]),
                sparse_scores(rows_KD, inputs_VD, RIDGES[-1]),
                span_scores(written.T, self._outputs_VD, RIDGES[-1]),
            ]
        )
