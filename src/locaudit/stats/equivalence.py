"""Is one edit as good as another? Non-inferiority and equivalence tests (TOST) by bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from locaudit.stats.resample import arms_of, percentiles, resampled_differences
from locaudit.stats.scores import TIE, mean_score

CONFIDENCE = 0.90
"""Confidence of the two-sided interval. Each of its ends is a one-sided test at 5 %."""
LEAST_DIFFERING = 10
"""Number of questions on which two edits must differ before the bootstrap of their difference is trusted."""
Outcome = Literal["not worse", "worse", "undecided"]


@dataclass(frozen=True)
class Match:
    """An edit compared with a reference on the same questions. Differences are in the score's units."""

    difference: float
    """Score of the edit minus score of the reference."""
    interval: tuple[float, float]
    """90 % bootstrap interval of the difference. Questions are resampled; edits and hyperparameters are held fixed."""
    interval_95: tuple[float, float]
    """The same interval at 95 %."""
    sd: float
    """Standard error of the difference: its standard deviation over resamples."""
    p: float
    """One-sided p of the non-inferiority test. Its null hypothesis is that the edit is worse by the margin or more.

    p = (1 + number of resamples in which it is worse by that much) / (1 + number of resamples). If several edits are
    tested, correct their p with `holm`."""
    p_equivalent: float
    """p of the equivalence test (TOST). Its null hypothesis is that the edits differ by the margin or more."""
    outcome: Outcome
    """``not worse``: the 90 % interval lies above -margin. ``worse``: it lies below -margin. ``undecided``: it contains
    -margin, so that there are too few questions to tell."""
    equivalent: bool
    """Whether the 90 % interval lies inside (-margin, margin). The edits are then equivalent at 5 %."""
    below: bool
    """Whether the 90 % interval lies below +margin. The edit is then not better by the margin."""
    few: bool
    """Whether too few questions differ to trust the bootstrap (`differ_too_little`). Then nothing is decided."""


def compare_edits(
    values: ArrayLike,
    reference: ArrayLike | Sequence[ArrayLike],
    *,
    margin: float,
    seed: int = 0,
    drawn: NDArray[np.float64] | None = None,
    tolerance: float = TIE,
) -> Match:
    """Compare an edit's `values` with `reference`, or with the mean score over a list of references.

    There are two one-sided tests (TOST, Schuirmann 1987). `Match.outcome` is the result of the lower one, which is a
    non-inferiority test. `Match.equivalent` is the result of both. Nothing is decided if one of the two sides has no
    score. `margin` is in the score's units.

    Shapes are as in `locaudit.stats.resample.arms_of`: (questions,) or (components, questions). `drawn` (resamples,)
    has the differences on the bootstrap resamples, if they were computed before. `tolerance` is as in
    `differ_too_little`.
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
    if differ_too_little(edit, others, margin, tolerance):
        return Match(difference, *seen, max(below, 0.5), max(below, above, 0.5), "undecided", False, False, True)
    outcome: Outcome = "not worse" if low > -margin else "worse" if high < -margin else "undecided"
    equivalent = -margin < low and high < margin
    return Match(difference, *seen, below, max(below, above), outcome, equivalent, high < margin, False)


def differ_too_little(values: ArrayLike, others: Sequence[ArrayLike], margin: float, tolerance: float = TIE) -> bool:
    """Whether too few questions differ for a bootstrap, but enough that a true difference of the margin is possible.

    If only a few questions differ, many resamples contain none of them, and the bootstrap interval is too narrow. For
    scores of 0 and 1, a true difference of the margin means that at least this share of questions differ. So if d of n
    questions differ and P(Bin(n, margin) <= d) is at most 5 %, a true difference of the margin can be rejected without
    a bootstrap, and the function returns False. Values count as equal if they differ by at most `tolerance`.
    """
    a = arms_of(values)[0]
    differ = np.zeros(a.shape[1], dtype=bool)  # (questions,): whether it differs from at least one of the others
    for (x,) in map(arms_of, others):
        differ |= (np.abs(a - x) > tolerance).any(axis=0) & ~(np.isnan(a) | np.isnan(x)).any(axis=0)
    d, n = int(differ.sum()), differ.size
    return d < LEAST_DIFFERING and float(stats.binom.cdf(d, n, min(margin, 1.0))) > (1 - CONFIDENCE) / 2
