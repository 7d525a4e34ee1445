"""How sure a score is, and whether two models differ on the same questions. Knows numbers alone. Q: questions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, permutation_test

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """A mean over questions."""

    mean: float
    stderr: float  # of the mean, over draws of questions; NaN for one question
    num_questions: int

    def to_json(self) -> dict[str, float | int | None]:
        stderr = None if math.isnan(self.stderr) else self.stderr  # JSON has no NaN
        return {"mean": self.mean, "stderr": stderr, "num_questions": self.num_questions}


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions."""

    difference: float  # mean of the second minus mean of the first
    stderr: float  # of the difference, paired
    num_first_better: int
    num_second_better: int
    p_value: float  # two-sided


def score_of(values: Values) -> Score:
    """``values``: [Q], Q at least 1."""
    return Score(float(values.mean()), _stderr(values), len(values))


def compare(first: Values, second: Values) -> Comparison:
    """The exact McNemar test for right and wrong answers (McNemar 1947; Dietterich 1998), else a permutation test of
    the paired differences. ``first`` and ``second``: [Q], the same questions in the same order."""
    assert len(first) == len(second)
    differences = second - first
    lost, won = int((differences < 0).sum()), int((differences > 0).sum())
    if set(np.unique(differences)) <= {-1.0, 0.0, 1.0}:
        p_value = float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
    else:
        test = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=9999, rng=0)
        p_value = float(test.pvalue)
    return Comparison(float(differences.mean()), _stderr(differences), lost, won, p_value)


def _stderr(values: Values) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
