"""What a success is: tokens found, words in order, members told from others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from rouge_score.rouge_scorer import RougeScorer

_ROUGE = RougeScorer(["rouge1", "rouge2"], use_stemmer=False)


def recall_of(found: Collection[int], truth: Collection[int]) -> float:
    """Share of the true tokens that were found; of distinct ones, as the span of a sum knows no more."""
    return len({*found} & {*truth}) / len({*truth})


def precision_of(found: Collection[int], truth: Collection[int]) -> float:
    """Share of the found tokens that are true; 0 if none were found."""
    return len({*found} & {*truth}) / len({*found}) if found else 0.0


def f1_of(found: Collection[int], truth: Collection[int]) -> float:
    """Harmonic mean of both."""
    return 2 * len({*found} & {*truth}) / (len({*found}) + len({*truth}))


def rouge(found: str, truth: str) -> tuple[float, float]:
    """F1 of words and of pairs of words (ROUGE-1 and ROUGE-2: Lin 2004), each from 0 to 1."""
    scores = _ROUGE.score(truth, found)
    return scores["rouge1"].fmeasure, scores["rouge2"].fmeasure


def roc(members: Sequence[float], others: Sequence[float]) -> list[tuple[float, float]]:
    """False and true positive rates as the threshold falls, from (0, 0) to (1, 1); higher scores mean members. Equal
    scores are passed at once."""
    points = [(0.0, 0.0)]
    for threshold in sorted({*members, *others}, reverse=True):
        false = sum(score >= threshold for score in others) / len(others)
        points.append((false, sum(score >= threshold for score in members) / len(members)))
    return points


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Area under it: how often a member's score is above another's, ties counted half."""
    return sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(roc(members, others)))


def true_positives_at(false_rate: float, members: Sequence[float], others: Sequence[float]) -> float:
    """The largest true positive rate with at most this false positive rate (Carlini et al. 2022)."""
    return max(true for false, true in roc(members, others) if false <= false_rate)
