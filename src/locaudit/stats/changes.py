"""The share of questions that an edit makes worse, and the share that it makes better, than without the edit.

A mean can rise while many questions get worse. A question is worse if its own score, the product of the score's
components there, is lower than the unedited model's by more than rounding; intervals are Wilson's (1927).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

AT_A_QUESTION = 5
"""Largest rounding at one question, as a multiple of the score's tolerance (`python -m bench.rounding`)."""


@dataclass(frozen=True)
class Changes:
    """How many questions an edit changed; worse means a lower score, whatever the method's scores support."""

    n: int
    """Test questions with a score under the edit and without it."""
    worse: float
    """Share of them whose score fell; NaN if there are none."""
    worse_interval: tuple[float, float]
    """95 % Wilson interval over questions."""
    better: float
    better_interval: tuple[float, float]


def find_changes(after: NDArray[np.float64], before: NDArray[np.float64], tolerance: float) -> NDArray[np.float64]:
    """The change of a score at each question, (questions,): 0 if it may be rounding, NaN where a score is missing.

    Arguments as in `count_changes`.
    """
    change = np.prod(after, axis=0) - np.prod(before, axis=0)
    return np.where(np.abs(change) <= AT_A_QUESTION * tolerance, 0.0, change)


def count_changes(
    after: NDArray[np.float64], before: NDArray[np.float64], tolerance: float, sign: float = 1.0
) -> Changes:
    """Compare a score at each question: `after` and `before` are (components, questions), NaN where missing.

    `tolerance` is that of the score's mean (`locaudit.stats.scores.tolerance`), and `sign` is -1 for a score whose sign
    was flipped (`locaudit.stats.measured.measure`).
    """
    change = sign * find_changes(after, before, tolerance)
    change = change[~np.isnan(change)]
    found = [_share(int((sign * change > 0).sum()), len(change)) for sign in (-1, 1)]
    return Changes(len(change), *found[0], *found[1])


def _share(k: int, n: int) -> tuple[float, tuple[float, float]]:
    if not n:
        return math.nan, (math.nan, math.nan)
    # scipy's `binomtest(k, n).proportion_ci(method="wilson")` gives the same, but also computes a p, which takes 1 ms.
    p, z = k / n, float(ndtri(0.975))
    centre, half = 2 * n * p + z * z, z * math.sqrt(4 * n * p * (1 - p) + z * z)
    low, high = ((centre + side) / (2 * (n + z * z)) for side in (-half, half))
    return p, (0.0 if k == 0 else low, 1.0 if k == n else high)
