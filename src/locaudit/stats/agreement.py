"""Measure how well two judges agree on the same answers: Cohen's kappa with bootstrap intervals.

    kappa = (p_o - p_e) / (1 - p_e)

p_o is the observed agreement, the share of answers on which both judges have the same verdict. p_e is the agreement
expected by chance, given how often each judge says yes. A verdict is yes if P(yes) >= threshold. Source: Cohen 1960.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from locaudit.errors import DataError
from locaudit.stats.ppi import LEAST
from locaudit.stats.resample import blocks, percentiles, weights

CHANCE = 0.1
"""Kappa below which agreement counts as that of chance, if its interval reaches down to 0, too."""
Interval = tuple[float, float]
"""Lower and upper end of a 95 % confidence interval; NaN if it is undefined."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges on the answers that both judged. Undefined values are NaN."""

    n: int
    """Number of answers that both judged."""
    n_groups: int
    """Number of questions that these answers belong to."""
    missing: tuple[int, int]
    """Number of answers without a judgement: (first judge, second judge)."""
    counts: tuple[tuple[int, int], tuple[int, int]]
    """2 x 2 table of verdicts, ``[first judge][second judge]``, no before yes."""
    yes: tuple[float, float]
    """Share of yes: (first judge, second judge)."""
    agreement: float
    """Share of answers with the same verdict."""
    agreement_interval: Interval
    kappa: float
    """Agreement beyond chance; NaN if both judges give the same verdict on every answer."""
    kappa_interval: Interval
    pearson: float
    """Correlation of the judges' probabilities; NaN if one judge's probabilities are all equal."""
    spearman: float
    """Rank correlation of the judges' probabilities. Tied ranks are averaged."""


def compare(
    first: Sequence[float | None],
    second: Sequence[float | None],
    groups: Sequence[str],
    *,
    threshold: float = 0.5,
    seed: int = 0,
) -> Agreement:
    """Compare two judges' P(yes) on the same answers; ``None`` marks a missing judgement.

    `groups` has the question of each answer. Intervals are percentile bootstrap intervals that resample questions,
    because answers to one question are not independent. Resamples in which kappa is undefined are left out of its
    interval. With fewer than 2 questions, the intervals are NaN.

    Raises `DataError` if the lengths differ or a probability is outside [0, 1].
    """
    if not len(first) == len(second) == len(groups):
        raise DataError(
            got=f"{len(first)} and {len(second)} judgements of {len(groups)} answers",
            expected="one judgement per judge and answer",
            remedy="pass None where a judgement is missing",
        )
    wrong = [x for x in (*first, *second) if x is not None and not 0 <= x <= 1]
    if wrong:
        raise DataError(
            got=f"the probability {wrong[0]}", expected="0 to 1, or None where missing", remedy="correct the judge"
        )
    both = [i for i in range(len(groups)) if first[i] is not None and second[i] is not None]
    x, y = (np.array([found[i] for i in both], dtype=float) for found in (first, second))
    names = {name: k for k, name in enumerate(dict.fromkeys(groups[i] for i in both))}
    # (answers,): cell of the 2 x 2 table, flattened row by row: 0 no/no, 1 no/yes, 2 yes/no, 3 yes/yes
    cell = 2 * (x >= threshold).astype(int) + (y >= threshold)
    group = np.array([names[groups[i]] for i in both], dtype=int)
    # (questions, 4): each question's 2 x 2 table, so that resampling questions is one matrix product
    table = np.bincount(4 * group + cell, minlength=4 * len(names)).reshape(-1, 4)
    total = table.sum(axis=0)
    agreement, kappa = _measures(total[None])
    resampled = [table[:0]]  # (resamples, 4) once concatenated; empty: no interval
    if len(table) > 1:
        resampled = [weights(len(table), seed)[rows] @ table for rows in blocks(len(table))]
    intervals = [percentiles(values, 0.95) for values in _measures(np.concatenate(resampled))]
    (n00, n01), (n10, n11) = total.astype(int).reshape(2, 2).tolist()
    n = len(both)
    vary = n > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return Agreement(
        n=n,
        n_groups=len(names),
        missing=(sum(v is None for v in first), sum(v is None for v in second)),
        counts=((n00, n01), (n10, n11)),
        yes=((n10 + n11) / n, (n01 + n11) / n) if n else (math.nan, math.nan),
        agreement=float(agreement[0]),
        agreement_interval=intervals[0],
        kappa=float(kappa[0]),
        kappa_interval=intervals[1],
        pearson=float(np.corrcoef(x, y)[0, 1]) if vary else math.nan,
        spearman=float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]) if vary else math.nan,
    )


def _measures(counts: NDArray) -> tuple[NDArray, NDArray]:
    """Agreement and kappa of 2 x 2 tables of counts (tables, 4). Both have the shape (tables,)."""
    n = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        n00, n01, n10, n11 = (counts / n[:, None]).T
        observed = n00 + n11
        expected = (n00 + n01) * (n00 + n10) + (n11 + n10) * (n11 + n01)
        # If both judges always give the same verdict, 1 - expected is 0 up to rounding, and kappa is undefined.
        kappa = np.where(1 - expected > 1e-12, (observed - expected) / (1 - expected), np.nan)
    return observed, kappa


def describe_chance(agreement: Mapping[str, Agreement]) -> tuple[str, ...]:
    """A sentence for each aspect whose trusted labels agree with the judge no better than by chance.

    That is: kappa is below `CHANCE`, its interval reaches down to 0, and at least `LEAST` questions have labels.
    `agreement` maps an aspect to the agreement of its judge with the labels.
    """
    return tuple(
        f"The labels contradict the judge of {aspect}: their agreement is no better than chance (kappa {a.kappa:.2f}, "
        f"95 % interval {a.kappa_interval[0]:.2f} to {a.kappa_interval[1]:.2f}, {a.n} answers), so scores by this "
        "judge say nothing."
        for aspect, a in agreement.items()
        if a.n_groups >= LEAST and a.kappa < CHANCE and a.kappa_interval[0] <= 0
    )
