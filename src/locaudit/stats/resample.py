"""Bootstrap over questions, for statistics without a formula for their interval (`locaudit.stats.agreement`).

A resample draws n questions with replacement. All statistics have the *same* resamples, those of SciPy's `bootstrap`.
Percentile intervals: Efron and Tibshirani 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 9_999
"""Number of resamples in a bootstrap, and of arrangements in a Monte-Carlo permutation test."""
_BLOCK = 4_000_000
"""Largest number of values in memory at a time when a matrix of resamples is made or used."""


def blocks(n: int, total: int = N_RESAMPLES) -> Iterator[slice]:
    """Slices that cut `total` rows of `n` numbers each into blocks of at most `_BLOCK` numbers."""
    size = max(1, _BLOCK // max(n, 1))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


@lru_cache(maxsize=8)
def weights(n: int, seed: int = 0) -> NDArray[np.uint16]:
    """The matrix W (resamples, n), read-only: how often each resample draws each of the `n` questions."""
    rng = np.random.default_rng(seed)
    out = np.empty((N_RESAMPLES, n), dtype=np.uint16)
    for rows in blocks(n):
        size = rows.stop - rows.start
        # (size, n): the n questions that each resample draws, shifted by n per row so that rows do not overlap
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        # one bincount over the flattened block counts within each row: (size * n,) -> (size, n)
        out[rows] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    out.flags.writeable = False
    return out


def percentiles(drawn: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Percentile interval: the central `confidence` of a bootstrap distribution without NaN; (NaN, NaN) if empty."""
    drawn = drawn[~np.isnan(drawn)]
    if not drawn.size:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
