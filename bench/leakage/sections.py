"""The bench's sections: which attacks are run on whom, behind which channels, and the rows that come of it.

A row is what JSON holds. Knows all attacks; must not know files or pages.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from torch import Tensor

from adapters.model import Adapter, set_adapter
from bench.leakage import membership
from bench.leakage.channels import CHANNELS, DELTA, EPSILONS, Channel, Ends, noise_multiplier, transmit
from bench.leakage.inverter import Inverter, Projection, TokenTraces, prior_guess
from bench.leakage.matching import Effort, Matcher
from bench.leakage.scores import precision_of, recall_of, rouge
from bench.leakage.sequences import OUTSIDE, exact_sentences, likely_sentence
from bench.leakage.span import (
    ATTACKS,
    RIDGES,
    Attack,
    Coordinates,
    Known,
    above,
    calibrated,
    dictionary_of,
    rows_of,
    span_scores,
)
from bench.leakage.victim import SMOLLM2, TOY, Victim
from privacy.mechanism import norm_of

Row = dict[str, Any]
ONE_CLIENT = tuple(channel for channel in CHANNELS if channel.clients == 1)
_MOST_CLIENTS = max(channel.clients for channel in CHANNELS)
_WORDS = re.compile(r"[A-Za-z ,.'-]+")
_GROUP = 4
"""Sentences that a client holds at most; its updates of fewer are of the first of them."""
_CANDIDATES = 32
_LONGEST = 26


@dataclass(frozen=True)
class Sizes:
    """How many of everything; ``own``: updates of the attacker's own per channel, by which it sets its thresholds."""

    models: tuple[str, ...]
    kinds: Mapping[str, tuple[tuple[str, int], ...]]  # of update, and sentences in it
    trials: Mapping[str, int]
    own: Mapping[str, int]
    sentences: Mapping[str, int]  # that are put into words
    told: Mapping[str, tuple[str, ...]]  # out of these kinds of update
    effort: Mapping[str, Effort]
    matched: Mapping[str, tuple[str, ...]]  # channels behind which gradients are matched
    most_matched: Mapping[str, int]  # of the sentences
    control_rank: Mapping[str, int]
    learned_from: int
    learned_trials: int
    federation: membership.Federation


_GRADIENTS = (("gradient", 1), ("gradient", 2), ("gradient", 4))
FULL = Sizes(
    models=(TOY, SMOLLM2),
    kinds={
        TOY: (*_GRADIENTS, ("delta", 1), ("delta", 2), ("delta", 4)),
        SMOLLM2: (*_GRADIENTS, ("delta", 1)),
    },
    trials={TOY: 8, SMOLLM2: 3},
    own={TOY: 8, SMOLLM2: 4},
    sentences={TOY: 3, SMOLLM2: 2},
    told={TOY: ("gradient", "delta"), SMOLLM2: ("gradient",)},
    effort={TOY: Effort(100, 100), SMOLLM2: Effort(8, 16)},
    matched={TOY: ("dense", "coded, 0.5 bit", "coded, 0.1 bit"), SMOLLM2: ("dense", "coded, 0.5 bit")},
    most_matched={TOY: 2, SMOLLM2: 1},
    control_rank={TOY: 64, SMOLLM2: 256},
    learned_from=240,
    learned_trials=24,
    federation=membership.Federation(),
)
QUICK = Sizes(
    models=(TOY,),
    kinds={TOY: (("gradient", 1), ("delta", 2))},
    trials={TOY: 2},
    own={TOY: 2},
    sentences={TOY: 1},
    told={TOY: ("gradient", "delta")},
    effort={TOY: Effort(3, 3)},
    matched={TOY: ("dense",)},
    most_matched={TOY: 1},
    control_rank={TOY: 64},
    learned_from=20,
    learned_trials=3,
    federation=membership.Federation(rounds=1, clients=2, windows=8, epochs=1),
)
LEARNED = tuple(channel for channel in ONE_CLIENT if channel.epsilon in (None, 8.0))
"""Behind less noise than the most: an attacker that learns nothing at epsilon 8 learns nothing at 2."""


class Side:
    """Updates of one kind, the victims' and the attacker's own, and what both ends know of the round."""

    def __init__(self, victim: Victim, kind: str, texts: Sequence[Sequence[str]], own: int) -> None:
        """``texts``: of each victim, of equally many sentences; ``own``: updates of the attacker's own."""
        self.victim, self.kind = victim, kind
        needed, count = max(own, _MOST_CLIENTS), len(texts[0])
        self.texts = texts
        self.own_texts = [_group(victim.texts.public, i)[:count] for i in range(needed)]
        self.updates = [victim.update(text, kind) for text in self.texts]
        self.own = [victim.update(text, kind) for text in self.own_texts]
        self.gradients = self.own if kind == "gradient" else [victim.update(one, "gradient") for one in self.own_texts]
        self.ends = Ends(victim.codec, victim.side, median(map(norm_of, self.own)))
        self._num_own = own

    def seen(self, channel: Channel, trial: int) -> Adapter:
        """What the server sees of a trial; the others of a mean are public."""
        return transmit(channel, [self.updates[trial], *self.own], self.ends, trial)

    def own_seen(self, channel: Channel) -> list[Adapter]:
        """What the server sees of the attacker's own updates, each beside others of them."""
        turned = [[*self.own[i:], *self.own[:i]] for i in range(self._num_own)]
        return [transmit(channel, updates, self.ends, 10_000 + i) for i, updates in enumerate(turned)]

    def known(self, channel: Channel) -> list[Known]:
        """The same as what thresholds are set by."""
        return [
            Known(rows_of(gradient, 0), rows_of(seen, 0), _tokens(self.victim, text))
            for gradient, seen, text in zip(self.gradients, self.own_seen(channel), self.own_texts, strict=False)
        ]

    def truth(self, trial: int) -> frozenset[int]:
        """The distinct tokens of a trial."""
        return _tokens(self.victim, self.texts[trial])


def tokens(sizes: Sizes, victims: Callable[[str], Victim], say: Callable[[str], None]) -> list[Row]:
    """Which tokens an update was made of, by every attack on the first layer, and by a guess without the update."""
    rows = []
    for name in sizes.models:
        victim = victims(name)
        dictionary_VD = dictionary_of(victim.model)
        for kind, count in sizes.kinds[name]:
            say(f"{name}: {kind} of {count}")
            texts = [_group(victim.texts.private, trial)[:count] for trial in range(sizes.trials[name])]
            side = Side(victim, kind, texts, sizes.own[name])
            about = {"model": name, "update": kind, "sentences": count}
            blind = prior_guess([_tokens(victim, text) for text in side.own_texts], len(dictionary_VD))
            rows.append(
                about | {"channel": "nothing", "attack": "most frequent"} | _found(side, [blind] * len(side.texts))
            )
            for channel in CHANNELS:
                seen = [side.seen(channel, trial) for trial in range(len(side.texts))]
                known = side.known(channel)
                error = mean(map(_error, side.updates, seen))
                for attack, scorer in ATTACKS.items():
                    ready = calibrated(scorer, dictionary_VD, known)
                    found = _found(side, [ready.guess(rows_of(one, 0)) for one in seen])
                    rows.append(about | {"channel": channel.name, "attack": attack, "error_energy": error} | found)
    return rows


def control(sizes: Sizes, say: Callable[[str], None]) -> list[Row]:
    """DAGER where it is exact: a rank of at least the number of tokens, uncoded, whole sentences."""
    rows = []
    for name in sizes.models:
        rank = sizes.control_rank[name]
        victim = Victim(name, rank)
        dictionary_VD = dictionary_of(victim.model)
        for count in (1, 2, 4):
            say(f"{name}: rank {rank}, {count} sentences")
            for trial in range(sizes.sentences[name]):
                text = _group(victim.texts.private, trial)[:count]
                update = victim.update(text, "gradient")
                set_adapter(victim.model, victim.adapter)
                victim.model.eval()
                guess = above(span_scores(rows_of(update, 0), dictionary_VD, RIDGES[0]), 1 - 100 * OUTSIDE)
                paths = exact_sentences(victim.model, rows_of(update, 1), guess, _LONGEST)
                told = [best_match(victim, paths, sentence) for sentence in text]
                truth = _tokens(victim, text)
                rows.append(
                    {"model": name, "rank": rank, "sentences": count, "true_tokens": len(truth)}
                    | {"recall": recall_of(guess, truth), "precision": precision_of(guess, truth)}
                    | _told(told, text)
                )
    return rows


def sentences(sizes: Sizes, victims: Callable[[str], Victim], say: Callable[[str], None]) -> list[Row]:
    """One sentence in words: by the second layer and the language model, by matching gradients, by both."""
    rows = []
    for name in sizes.models:
        victim = victims(name)
        dictionary_VD = dictionary_of(victim.model)
        for kind in sizes.told[name]:
            side = Side(victim, kind, [[one] for one in unheard(victim)[: sizes.sentences[name]]], sizes.own[name])
            for channel in CHANNELS:
                known = side.known(channel)
                attacks = [calibrated(scorer, dictionary_VD, known) for scorer in ATTACKS.values()]
                for trial, [sentence] in enumerate(side.texts):
                    say(f"{name}: {kind}, {channel.name}, sentence {trial + 1}")
                    effort = (
                        sizes.effort[name]
                        if channel.name in sizes.matched[name] and trial < sizes.most_matched[name]
                        else None
                    )
                    told = reconstructed(side, side.seen(channel, trial), attacks, effort, trial)
                    about = {"model": name, "update": kind, "channel": channel.name, "sentence": sentence}
                    rows += [about | {"attack": how} | _told([text], [sentence]) for how, text in told.items()]
    return rows


def reconstructed(
    side: Side, seen: Adapter, attacks: Sequence[Attack], effort: Effort | None, trial: int
) -> dict[str, str]:
    """Attack -> the sentence as it reads. Matching is for gradients, as a delta of AdamW is none, and
    where there is an ``effort`` to spend."""
    victim = side.victim
    set_adapter(victim.model, side.victim.adapter)
    victim.model.eval()
    first_KD, length = rows_of(seen, 0), len(victim.ids(side.texts[trial][0]))
    guesses = [attack.guess(first_KD)[:_CANDIDATES] for attack in attacks]
    bag = list(dict.fromkeys(token for guess in guesses for token in guess))
    likely = likely_sentence(victim.model, rows_of(seen, 1), bag, length)
    told = {"second layer and language model": likely}
    if side.kind == "gradient" and bag and effort is not None:
        scores_V: Tensor = attacks[-1].scores(first_KD)
        more = [int(token) for token in scores_V.topk(_CANDIDATES).indices]
        candidates = list(dict.fromkeys([*bag, *more]))
        matcher = Matcher(victim.model, victim.adapter, seen, victim.tokenizer.eos_token_id)
        told["gradient matching"] = matcher.invert(scores_V, candidates, length, effort)
        if likely:
            told["gradient matching from the above"] = matcher.improved(likely, candidates, effort.moves)
    return {how: victim.tokenizer.decode(ids) for how, ids in told.items()}


def learned(sizes: Sizes, victims: Callable[[str], Victim], say: Callable[[str], None]) -> list[Row]:
    """The attacker that is trained through each channel; the embedded model, gradients of one sentence."""
    victim = victims(TOY)
    vocabulary = len(dictionary_of(victim.model))
    texts = victim.texts.public[: sizes.learned_from]
    own = [victim.update([text], "gradient") for text in texts]
    targets = victim.texts.private[: sizes.learned_trials]
    updates = [victim.update([text], "gradient") for text in targets]
    truths = [_tokens(victim, [text]) for text in targets]
    ends = Ends(victim.codec, victim.side, median(map(norm_of, own)))
    known = [_tokens(victim, [text]) for text in texts]
    blind = prior_guess(known, vocabulary)
    rows = [_learned_row("nothing", [blind] * len(truths), truths, None)]
    for channel in LEARNED:
        say(f"learning behind {channel.name}")
        seen = [transmit(channel, [one], ends, 10_000 + i) for i, one in enumerate(own)]
        pairs = [(rows_of(sent, 0), rows_of(one, 0)) for sent, one in zip(own[:32], seen[:32], strict=True)]
        coordinates = Coordinates(dictionary_of(victim.model), pairs)
        decoder = victim.model.get_base_model()
        traces = TokenTraces(
            coordinates, decoder.get_input_embeddings().weight.detach(), decoder.config.num_hidden_layers - 1
        )
        inverter = Inverter(traces, Projection(victim.layout.num_parameters), vocabulary)
        f1 = inverter.fit(seen, known)
        guesses = [inverter.guess(transmit(channel, [one], ends, i)) for i, one in enumerate(updates)]
        rows.append(_learned_row(channel.name, guesses, truths, f1))
    return rows


def members(sizes: Sizes, victims: Callable[[str], Victim], say: Callable[[str], None]) -> list[Row]:
    """Who was trained on, told from the trained adapter; the embedded model."""
    rows = []
    for channel in LEARNED:
        say(f"a run, {channel.name}")
        rows.append(membership.attack(victims(TOY), channel, sizes.federation))
    return rows


def noise_rows() -> list[Row]:
    """What noise the channels with one add."""
    return [
        {"epsilon": epsilon, "delta": DELTA, "standard_deviation_over_clip": noise_multiplier(epsilon)}
        for epsilon in EPSILONS
    ]


def unheard(victim: Victim) -> list[str]:
    """The private sentences of words alone that begin as no public one does: answers are often of one pattern."""
    begun = {_beginning(sentence) for sentence in victim.texts.public}
    return [
        sentence
        for sentence in victim.texts.private
        if _WORDS.fullmatch(sentence) and _beginning(sentence) not in begun
    ]


def _beginning(sentence: str) -> tuple[str, ...]:
    return tuple(sentence.split()[:2])


def best_match(victim: Victim, paths: Sequence[Sequence[int]], sentence: str) -> str:
    """Of the sequences that were found, the one most like a sentence: how batches are judged (DAGER, LAMP)."""
    texts: list[str] = [victim.tokenizer.decode(path) for path in paths]
    return max(texts, key=lambda text: sum(rouge(text, sentence)), default="")


def _group(sentences: Sequence[str], number: int) -> Sequence[str]:
    return sentences[_GROUP * number : _GROUP * (number + 1)]


def _tokens(victim: Victim, text: Sequence[str]) -> frozenset[int]:
    return frozenset(token for sentence in text for token in victim.ids(sentence))


def _found(side: Side, guesses: Sequence[Sequence[int]]) -> Row:
    truths = [side.truth(trial) for trial in range(len(guesses))]
    return {
        "trials": len(guesses),
        "true_tokens": mean(map(len, truths)),
        "recall": mean(map(recall_of, guesses, truths)),
        "precision": mean(map(precision_of, guesses, truths)),
    }


def _learned_row(
    channel: str, guesses: Sequence[Sequence[int]], truths: Sequence[frozenset[int]], own_f1: float | None
) -> Row:
    return {
        "channel": channel,
        "trials": len(truths),
        "recall": mean(map(recall_of, guesses, truths)),
        "precision": mean(map(precision_of, guesses, truths)),
        "f1_on_own": own_f1,
    }


def _told(told: Sequence[str], truth: Sequence[str]) -> Row:
    pairs = [rouge(one, other) for one, other in zip(told, truth, strict=True)]
    exact = [one.strip() == other.strip() for one, other in zip(told, truth, strict=True)]
    return {
        "rouge1": mean(one for one, _ in pairs),
        "rouge2": mean(two for _, two in pairs),
        "exact": mean(map(float, exact)),
        "told": [*told],
        "truth": [*truth],
    }


def _error(sent: Adapter, seen: Adapter) -> float:
    """Energy of what the channel changed over that of the update."""
    return norm_of({name: seen[name] - sent[name] for name in sent}) ** 2 / norm_of(sent) ** 2
