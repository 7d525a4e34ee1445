"""Tokens -> sentences: what the second layer reads tells the order.

The second layer's input at a position depends on all tokens before it, so that a guessed prefix can be tried against
the span of that layer's rows. Where the rank is at least the number of tokens this is exact, and sentences grow token
by token (DAGER: Petrov et al. 2024, section 4.3). Where it is not, or where the rows are coded, the check is evidence
beside the language model's own, in a beam search of a length that the attacker is told, as LAMP's is (Balunovic et al.
2022). Knows a model and rows; must not know channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor

from bench.leakage.span import RIDGES, span_scores

OUTSIDE = 1e-4
"""Share of an input outside of the span up to which it lies in it but for float32; wrong prefixes have 2e-4 and
more."""
BEAM = 6
_MOST_PATHS = 12
_FAINTEST = 1e-6


class _ReachedError(Exception):
    """The second layer is about to read; nothing after it is needed."""


@torch.no_grad()
def second_inputs(model: PeftModel, ids_NT: Tensor) -> Tensor:
    """What the second layer reads at the last position of each prefix, of length 1, ``[N, D]`` float32."""
    kept: list[Tensor] = []

    def reached(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])
        raise _ReachedError

    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(reached)
    try:
        model(input_ids=ids_NT, use_cache=False)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return torch.nn.functional.normalize(kept[0][:, -1].float())


def exact_sentences(model: PeftModel, rows_KD: Tensor, tokens: Sequence[int], longest: int) -> list[list[int]]:
    """All sequences of these tokens whose second-layer inputs lie in the rows' span, each as long as it goes."""
    growing: list[list[int]] = [[]]
    ended: list[list[int]] = []
    for _ in range(longest):
        tried = [[*path, token] for path in growing for token in tokens]
        if not tried:
            break
        scores = span_scores(rows_KD, second_inputs(model, torch.tensor(tried)), RIDGES[0])
        best = sorted(zip(scores.tolist(), tried, strict=True), reverse=True)[:_MOST_PATHS]
        going = [path for score, path in best if score > 1 - OUTSIDE]
        grown = {tuple(path[:-1]) for path in going}
        ended += [path for path in growing if path and tuple(path) not in grown]
        growing = going
    return ended + [path for path in growing if path]


@torch.no_grad()
def likely_sentence(model: PeftModel, rows_KD: Tensor, tokens: Sequence[int], length: int) -> list[int]:
    """The best sequence of these tokens by the language model's log-probabilities and the logarithm of how little of
    the second layer's input lies outside of the span. A token that is used again is paid for each time, and none
    follows itself: the second layer does not tell a text's first token from its repetition."""
    if not tokens:
        return []
    choices = torch.tensor(tokens)
    beam: list[tuple[float, list[int]]] = [(0.0, [])]
    for position in range(length):
        paths = [path for _, path in beam]
        prefixes = torch.tensor(paths) if position else torch.zeros(1, 0, dtype=torch.int64)
        likely_BN = _next_tokens(model, prefixes, choices)
        tried = torch.cat([prefixes.repeat_interleave(len(choices), 0), choices.repeat(len(paths))[:, None]], 1)
        spans_BN = span_scores(rows_KD, second_inputs(model, tried), RIDGES[0]).view(len(paths), -1)
        evidence_BN = -(1 - spans_BN).clamp_min(_FAINTEST).log()
        grown = []
        for (total, path), likely_N, evidence_N in zip(beam, likely_BN.tolist(), evidence_BN.tolist(), strict=True):
            for token, log_likely, evidence in zip(tokens, likely_N, evidence_N, strict=True):
                if path[-1:] != [token] or len(tokens) == 1:
                    again = path.count(token) * math.log(len(tokens))
                    grown.append((total + log_likely + evidence - again, [*path, token]))
        beam = sorted(grown, key=lambda one: one[0], reverse=True)[:BEAM]
    return beam[0][1]


def _next_tokens(model: PeftModel, prefixes_BT: Tensor, choices_N: Tensor) -> Tensor:
    """Log-probabilities ``[B, N]`` among the choices; at the start all are alike."""
    if prefixes_BT.shape[1] == 0:
        return torch.zeros(1, len(choices_N))
    logits_BV = model(input_ids=prefixes_BT, use_cache=False, logits_to_keep=1).logits[:, -1]
    return torch.log_softmax(logits_BV.float()[:, choices_N], -1)
