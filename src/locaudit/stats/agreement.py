"""How far two judges agree on the same answers.

kappa = (p_o - p_e) / (1 - p_e), where p_o is the share of answers with the same verdict and p_e the share expected from
the two judges' own shares of yes. Source: Cohen 1960. A verdict is yes where P(yes) >= threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from locaudit.errors import DataError
from locaudit.stats.resample import blocks, percentiles, weights

Interval = tuple[float, float]
"""Lower and upper end of 95%; NaN where there is none."""


@dataclass(frozen=True)
class Agreement:
    """Two judges on the answers that both judged. NaN stands for what is not defined."""

    n: int
    """Answers that both judged."""
    n_groups: int
    """Questions that these answers belong to."""
    missing: tuple[int, int]
    """Answers without a judgement, for each judge."""
    counts: tuple[tuple[int, int], tuple[int, int]]
    """[first judge's verdict][second's], no before yes."""
    yes: tuple[float, float]
    """Share of yes, for each judge."""
    agreement: float
    """Share of answers with the same verdict."""
    agreement_interval: Interval
    kappa: float
    """Agreement beyond chance; NaN when both judges give one and the same verdict throughout."""
    kappa_interval: Interval
    pearson: float
    """Correlation of the probabilities; NaN when one judge's are all equal."""
    spearman: float
    """Correlation of their ranks, ties averaged."""


def compare(
    first: Sequence[float | None],
    second: Sequence[float | None],
    groups: Sequence[str],
    *,
    threshold: float = 0.5,
    seed: int = 0,
) -> Agreement:
    """Compare two judges' P(yes) on the same answers; ``None`` is missing.

    `groups` names the question of each answer. The intervals are percentile bootstrap intervals over questions, because
    answers to one question are not independent; resamples in which kappa is undefined are left out of its interval.
    With fewer than 2 questions there is none. Raises `DataError` for unequal lengths or a probability outside [0, 1].
    """
    if not len(first) == len(second) == len(groups):
        raise DataError(
            got=f"{len(first)} and {len(second)} judgements of {len(groups)} answers",
            expected="one of each judge for each answer",
            remedy="pass None for a missing one",
        )
    wrong = [x for x in (*first, *second) if x is not None and not 0 <= x <= 1]
    if wrong:
        raise DataError(
            got=f"the probability {wrong[0]}", expected="0 to 1, or None where missing", remedy="mend the judge"
        )
    both = [i for i in range(len(groups)) if first[i] is not None and second[i] is not None]
    x = np.array([first[i] for i in both], dtype=float)
    y = np.array([second[i] for i in both], dtype=float)
    names = {name: k for k, name in enumerate(dict.fromkeys(groups[i] for i in both))}
    # Cell of each answer in the 2 x 2 table, row by row.
    cell = 2 * (x >= threshold).astype(int) + (y >= threshold)
    group = np.array([names[groups[i]] for i in both], dtype=int)
    table = np.bincount(4 * group + cell, minlength=4 * len(names)).reshape(-1, 4)
    total = table.sum(axis=0)
    agreement, kappa = _measures(total[None])
    resampled = [table[:0]]
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
    """Agreement and kappa of 2 x 2 counts (tables, 4)."""
    n = counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        n00, n01, n10, n11 = (counts / n[:, None]).T
        observed = n00 + n11
        expected = (n00 + n01) * (n00 + n10) + (n11 + n10) * (n11 + n01)
        # 1 - expected is 0 when both always say the same; rounding must not make it a number.
        kappa = np.where(1 - expected > 1e-12, (observed - expected) / (1 - expected), np.nan)
    return observed, kappa
