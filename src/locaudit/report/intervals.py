"""Bootstrap intervals of many trials' scores at once, over the same resamples of the questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from locaudit.records import TrialRecord
from locaudit.stats.scores import components
from locaudit.stats.tests import N_RESAMPLES

_CHUNK = 40
"""Trials at a time."""
_BLOCK = 5_000_000
"""Numbers in a block of resamples."""


def score_intervals(
    records: Sequence[TrialRecord], scores: Sequence[str], *, confidence: float = 0.95, seed: int = 0
) -> dict[str, dict[str, tuple[float, float]]]:
    """Trial id -> score -> percentile bootstrap interval on the test questions, for the trials that have the score.

    Equal to `locaudit.stats.score_interval` of each, whose resamples these are: how often each question is drawn is
    counted once, and sums over a resample are a matrix product for all trials together.
    """
    names = sorted({name for score in scores for name in components(score)})
    scored = [r for r in records if names and all(name in r.questions.get("test", {}) for name in names)]
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for start in range(0, len(scored), _CHUNK):
        chunk = scored[start : start + _CHUNK]
        values = np.asarray([[r.questions["test"][name] for r in chunk] for name in names], dtype=float)
        means = dict(zip(names, _resampled_means(values, seed), strict=True))
        for i, record in enumerate(chunk):
            found = {}
            for score in scores:
                drawn = np.prod([means[name][i] for name in components(score)], axis=0)
                found[score] = _percentiles(drawn, confidence)
            out[record.spec.trial_id] = found
    return out


def _resampled_means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of (names, trials, questions) over each resample's questions that have a value: (names, trials, draws)."""
    there = ~np.isnan(values)
    sums, counts = [], []
    for weights in _resamples(values.shape[-1], seed):
        sums.append(np.where(there, values, 0.0) @ weights)
        counts.append(there.astype(float) @ weights)
    n = np.concatenate(counts, axis=-1)
    return np.where(n > 0, np.concatenate(sums, axis=-1) / np.maximum(n, 1), np.nan)


def _resamples(n: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each of `n` questions is drawn, (questions, draws), block by block."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // max(n, 1))
    for start in range(0, N_RESAMPLES, block):
        size = min(block, N_RESAMPLES - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=n * size).reshape(size, n).T.astype(float)


def _percentiles(drawn: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    finite = drawn[~np.isnan(drawn)]  # a resample may hold no judged question at all; it says nothing
    if not finite.size:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
