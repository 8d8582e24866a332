"""Is one edit as good as another? Non-inferiority and equivalence tests (TOST, Schuirmann 1987)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from numpy.typing import ArrayLike

from locaudit.stats.intervals import estimate
from locaudit.stats.scores import TIE

CONFIDENCE = 0.90
"""Confidence of the two-sided interval. Each of its ends is a one-sided test at 5 %."""
Outcome = Literal["not worse", "worse", "undecided"]


@dataclass(frozen=True)
class Match:
    """An edit compared with a reference on the same questions. Differences are in the score's units."""

    difference: float
    """Score of the edit minus score of the reference."""
    interval: tuple[float, float]
    """90 % interval of the difference over questions (`locaudit.stats.intervals.Estimate`). Edits are held fixed."""
    interval_95: tuple[float, float]
    """The same interval at 95 %."""
    sd: float
    """Standard error of the difference."""
    p: float
    """One-sided p of the non-inferiority test. Its null hypothesis is that the edit is worse by the margin or more.

    If several edits are tested, correct their p with `holm`."""
    p_equivalent: float
    """p of the equivalence test (TOST). Its null hypothesis is that the edits differ by the margin or more."""
    outcome: Outcome
    """``not worse``: the 90 % interval lies above -margin. ``worse``: it lies below -margin. ``undecided``: it contains
    -margin, so that there are too few questions to tell, or one of the two has no score."""
    equivalent: bool
    """Whether the 90 % interval lies inside (-margin, margin). The edits are then equivalent at 5 %."""
    below: bool
    """Whether the 90 % interval lies below +margin. The edit is then not better by the margin."""


def compare_edits(
    values: ArrayLike,
    reference: ArrayLike | Sequence[ArrayLike],
    *,
    margin: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    tolerance: float = TIE,
) -> Match:
    """Compare an edit's `values` with `reference`, or with the mean score over a list of references.

    There are two one-sided tests. `Match.outcome` is the result of the lower one, which is a non-inferiority test.
    `Match.equivalent` is the result of both. Nothing is decided if one of the two sides has no score. `margin` and
    `bounds`, the smallest and largest possible score, are in the score's units.

    Shapes are as in `locaudit.stats.intervals.arms_of`: (questions,) or (components, questions). `tolerance` as in
    `estimate`.
    """
    found = estimate(values, reference, bounds=bounds, tolerance=tolerance)
    low, high = found.interval(CONFIDENCE)
    p = found.p_above(-margin)
    outcome: Outcome = "not worse" if low > -margin else "worse" if high < -margin else "undecided"
    return Match(
        difference=found.value,
        interval=(low, high),
        interval_95=found.interval(),
        sd=found.se,
        p=p,
        p_equivalent=max(p, found.p_below(margin)),
        outcome="undecided" if math.isnan(found.value) else outcome,
        equivalent=-margin < low and high < margin,
        below=high < margin,
    )
