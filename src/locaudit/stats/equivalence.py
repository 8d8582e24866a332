"""Does one edit do as well as another? A difference, its interval, and a margin: never a bare comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from locaudit.stats.resample import arms_of, percentiles, resampled_differences
from locaudit.stats.scores import mean_score

CONFIDENCE = 0.90
"""Of the interval: a test of "worse by more than the margin" at 5 %."""
LEAST_DIFFERING = 10
"""Questions that must differ between two edits for a bootstrap of their difference."""
Outcome = Literal["not worse", "worse", "undecided"]


@dataclass(frozen=True)
class Match:
    """How an edit compares with a reference, on the same questions."""

    difference: float
    """Score of the edit minus that of the reference."""
    interval: tuple[float, float]
    """90 % bootstrap interval of the difference over questions, hyperparameters and locations held fixed."""
    interval_95: tuple[float, float]
    """The same at 95 %."""
    sd: float
    """Standard deviation of the difference over resamples."""
    p: float
    """One-sided p that the edit is worse by the margin or more: the share of resamples in which it is, with one more
    counted. `holm` corrects several of them."""
    p_equivalent: float
    """p of two one-sided tests that the edits differ by the margin or more, in either direction."""
    outcome: Outcome
    """``not worse`` by more than the margin: the interval lies above -margin; ``worse``: it lies below; ``undecided``:
    -margin is inside, so that the questions are too few to tell."""
    equivalent: bool
    """The interval lies between -margin and margin: equivalent at 5 %."""
    below: bool
    """The interval lies below margin: not better by it."""
    few: bool
    """Too few questions differ for the bootstrap to be trusted, and too many for their number alone to exclude the
    margin: nothing is decided then."""


def compare_edits(
    values: ArrayLike,
    reference: ArrayLike | Sequence[ArrayLike],
    *,
    margin: float,
    seed: int = 0,
    drawn: NDArray[np.float64] | None = None,
) -> Match:
    """`values` against `reference` (or the mean over a list of them), shapes as in `locaudit.stats.resample.arms_of`.

    Two one-sided tests (TOST, Schuirmann 1987), of which `outcome` is the lower half: non-inferiority. Nothing is
    decided where a score is missing. `drawn` are the differences on resamples of the questions, where they are known.
    """
    edit, others = arms_of(values)[0], arms_of(reference)
    difference = float(mean_score(edit)) - float(np.mean([mean_score(x) for x in others]))
    if math.isnan(difference):
        nothing = (math.nan, math.nan)
        return Match(difference, nothing, nothing, math.nan, 1.0, 1.0, "undecided", False, False, True)
    drawn = resampled_differences(edit, others, seed) if drawn is None else drawn[~np.isnan(drawn)]
    low, high = percentiles(drawn, CONFIDENCE)
    seen = ((low, high), percentiles(drawn, 0.95), float(drawn.std(ddof=1)))
    below, above = (float((1 + np.sum(~(x < margin))) / (1 + drawn.size)) for x in (-drawn, drawn))
    if differ_too_little(edit, others, margin):
        return Match(difference, *seen, max(below, 0.5), max(below, above, 0.5), "undecided", False, False, True)
    outcome: Outcome = "not worse" if low > -margin else "worse" if high < -margin else "undecided"
    equivalent = -margin < low and high < margin
    return Match(difference, *seen, below, max(below, above), outcome, equivalent, high < margin, False)


def differ_too_little(values: ArrayLike, others: Sequence[ArrayLike], margin: float) -> bool:
    """Whether so few questions differ that a resample may hold none, though the true difference is the margin.

    With scores of 0 and 1, a difference of the margin shows in at least that share of the questions: where d of n
    differ and P(Bin(n, margin) <= d) is at most 5 %, it is excluded without a bootstrap.
    """
    a = arms_of(values)[0]
    differ = np.zeros(a.shape[1], dtype=bool)
    for (x,) in map(arms_of, others):
        differ |= (a != x).any(axis=0) & ~(np.isnan(a) | np.isnan(x)).any(axis=0)
    d, n = int(differ.sum()), differ.size
    return d < LEAST_DIFFERING and float(stats.binom.cdf(d, n, min(margin, 1.0))) > (1 - CONFIDENCE) / 2
