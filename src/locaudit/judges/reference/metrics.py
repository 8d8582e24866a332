"""How well probabilities agree with labels, with intervals that resample questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

N_BINS = 10
"""Equal-width bins of the expected calibration error."""
N_BOOTSTRAP = 2000
"""Resamples of the interval."""


def measure(
    p: Float[np.ndarray, " n"], y: Bool[np.ndarray, " n"], questions: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Agreement of P(yes) with the labels at threshold 0.5; plain numbers, None where they do not exist.

    `accuracy_95` is a percentile interval over resampled questions. `ece` is the mean over answers of
    ``|share of yes - mean P|`` of the answer's bin. `auc` is the Mann-Whitney statistic, ties counted half.
    """
    if not len(y):
        return {"n": 0}
    right = (p > 0.5) == y
    parts = [right[y], right[~y]]
    both = all(len(part) for part in parts)
    return {
        "n": len(y),
        "n_questions": len(set(questions)),
        "majority": float(max(y.mean(), 1 - y.mean())),
        "accuracy": float(right.mean()),
        "accuracy_95": _interval(right, questions, seed),
        "balanced_accuracy": float(np.mean([part.mean() for part in parts])) if both else None,
        "brier": float(np.mean((p - y) ** 2)),
        "ece": _calibration_error(p, y),
        "ece_bins": N_BINS,
        "auc": _auc(p, y) if both else None,
    }


def _interval(right: Bool[np.ndarray, " n"], questions: Sequence[str], seed: int) -> list[float]:
    _, which = np.unique(np.array(questions), return_inverse=True)
    n = np.bincount(which)
    hits = np.bincount(which, weights=right)
    draws = np.random.default_rng(seed).integers(len(n), size=(N_BOOTSTRAP, len(n)))
    shares = hits[draws].sum(1) / n[draws].sum(1)
    return [float(value) for value in np.quantile(shares, [0.025, 0.975])]


def _calibration_error(p: Float[np.ndarray, " n"], y: Bool[np.ndarray, " n"]) -> float:
    bins = np.minimum((p * N_BINS).astype(int), N_BINS - 1)
    gaps = np.bincount(bins, weights=y - p, minlength=N_BINS)
    return float(np.abs(gaps).sum() / len(y))


def _auc(p: Float[np.ndarray, " n"], y: Bool[np.ndarray, " n"]) -> float:
    from scipy.stats import rankdata

    n_yes = int(y.sum())
    return float((rankdata(p)[y].sum() - n_yes * (n_yes + 1) / 2) / (n_yes * (len(y) - n_yes)))
