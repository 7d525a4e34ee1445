"""The continuous attack: a sentence whose gradient looks like the update.

LAMP (Balunovic et al. 2022): the cosine distance of gradients, minimised over embeddings, in turns with moves of whole
tokens that the language model judges, too. Departures: at every position the embedding is a mixture of the candidate
tokens' (as in GBDA, Guo et al. 2021), so that the labels of a causal model, which are the tokens themselves, are
mixtures as well; and the mixtures start from what the first layer's span says. The attacker is told the length, as in
LAMP. Knows a model and an update; must not know channels.

Shape suffixes: T positions, N candidates, H width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from adapters.model import set_adapter
from adapters.windows import Windows, next_token_loss

_LR = 0.3
_HARDER = 4.0
"""How much sharper mixtures are in the end, so that they come to single tokens."""
_LIKELY = 0.02
"""What a nat a token of the language model's loss counts beside the cosine distance."""


@dataclass(frozen=True)
class Effort:
    """Steps on mixtures, and whole-token moves that are tried after them."""

    steps: int
    moves: int


class Matcher:
    """One update, seen through a channel, and the model that it was made with."""

    def __init__(self, model: PeftModel, adapter: Mapping[str, Tensor], seen: Mapping[str, Tensor], end: int) -> None:
        """``end``: the end-of-text token, which follows every sentence."""
        set_adapter(model, adapter)
        self._model, self._end = model.eval(), end
        named = [(name.replace(".default", ""), one) for name, one in model.named_parameters() if one.requires_grad]
        self._parameters = [parameter for _, parameter in named]
        self._target = torch.cat([-seen[name].flatten() for name, _ in named])  # an update goes down the gradient
        self._embed_VH: Tensor = model.get_base_model().get_input_embeddings().weight.detach()

    def objective(self, ids: Sequence[int]) -> float:
        """Cosine distance of the sentence's gradient, and a little of its loss."""
        loss = next_token_loss(self._model, Windows.whole(torch.tensor([[*ids, self._end]])))
        gradients = torch.autograd.grad(loss, self._parameters)
        return float((self._distance(gradients) + _LIKELY * loss).detach())

    def invert(self, evidence_V: Tensor, candidates: Sequence[int], length: int, effort: Effort) -> list[int]:
        """A sentence of this length.

        Args:
            evidence_V: how much speaks for each token of the vocabulary; where the mixtures start.
            candidates: tokens that mixtures are of.
            length: tokens.
            effort: how long it is sought.
        """
        generator = torch.Generator().manual_seed(0)
        choices_N = torch.tensor(candidates)
        evidence_N = functional.normalize(evidence_V[choices_N] - evidence_V[choices_N].mean(), dim=0)
        start_TN = 2 * evidence_N * len(choices_N) ** 0.5 + 0.5 * torch.randn(
            length, len(choices_N), generator=generator
        )
        mixed = choices_N[self._mixtures(start_TN, choices_N, effort.steps).argmax(1)].tolist()
        return self.improved(mixed, candidates, effort.moves)

    def improved(self, ids: Sequence[int], candidates: Sequence[int], moves: int) -> list[int]:
        """The sentence after so many tried moves: two tokens swapped, a run of tokens taken elsewhere, one replaced by
        a candidate; each kept if the objective falls."""
        generator = torch.Generator().manual_seed(0)
        best, value = [*ids], self.objective(ids)
        for number in range(moves):
            tried = _moved(best, candidates, number % 3, generator)
            if tried != best and (tried_value := self.objective(tried)) < value:
                best, value = tried, tried_value
        return best

    def _mixtures(self, logits_TN: Tensor, choices_N: Tensor, steps: int) -> Tensor:
        logits_TN = logits_TN.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits_TN], lr=_LR)
        end_H = self._embed_VH[self._end]
        for step in range(steps):
            weights_TN = (logits_TN * (1 + _HARDER * step / steps)).softmax(1)
            inputs = torch.cat([weights_TN @ self._embed_VH[choices_N], end_H[None]])[None]
            predicted_TV = self._model(inputs_embeds=inputs, use_cache=False).logits[0, :-1].float().log_softmax(-1)
            said = (weights_TN[1:] * predicted_TV[:-1, choices_N]).sum() + predicted_TV[-1, self._end]
            loss = -said / len(weights_TN)
            gradients = torch.autograd.grad(loss, self._parameters, create_graph=True)
            objective = self._distance(gradients) + _LIKELY * loss
            (logits_TN.grad,) = torch.autograd.grad(objective, logits_TN)
            optimizer.step()
        return logits_TN.detach()

    def _distance(self, gradients: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        return 1 - functional.cosine_similarity(flat, self._target, dim=0)


def _moved(ids: list[int], candidates: Sequence[int], kind: int, generator: torch.Generator) -> list[int]:
    first, second, third = torch.randint(len(ids), (3,), generator=generator).tolist()
    moved = [*ids]
    if kind == 0:
        moved[first], moved[second] = moved[second], moved[first]
    elif kind == 1:
        start, stop = sorted((first, second))
        run, rest = moved[start : stop + 1], moved[:start] + moved[stop + 1 :]
        place = min(third, len(rest))
        moved = rest[:place] + run + rest[place:]
    else:
        moved[first] = candidates[int(torch.randint(len(candidates), (1,), generator=generator))]
    return moved
