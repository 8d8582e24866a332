"""Boosted trees as plain arrays, evaluated in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from locaudit.errors import LocauditError

_N_TREES, _DEPTH, _RATE = 250, 4, 0.06
TREE_SETTINGS = {
    "n_estimators": _N_TREES,
    "max_depth": _DEPTH,
    "learning_rate": _RATE,
    "subsample": 0.5,
    "max_features": 0.15,
    "min_samples_leaf": 15,
}
"""scikit-learn's names."""


@dataclass(frozen=True)
class Trees:
    """Log-odds ``bias + sum_t value[t, leaf_t(x)]``. A leaf points to itself, so every walk has the same length."""

    feature: Int[np.ndarray, "trees nodes"]
    threshold: Float[np.ndarray, "trees nodes"]
    left: Int[np.ndarray, "trees nodes"]
    right: Int[np.ndarray, "trees nodes"]
    value: Float[np.ndarray, "trees nodes"]
    bias: float

    def __call__(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, " n"]:
        """Log-odds of each row."""
        x = x.astype(np.float32)
        trees, rows = np.arange(len(self.feature))[None], np.arange(len(x))[:, None]
        node = np.zeros((len(x), len(self.feature)), dtype=np.int64)
        for _ in range(_DEPTH):
            goes_left = x[rows, self.feature[trees, node]] <= self.threshold[trees, node]
            node = np.where(goes_left, self.left[trees, node], self.right[trees, node])
        return self.bias + self.value[trees, node].sum(1)

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays to store; the inverse of `from_arrays`."""
        return {
            "feature": self.feature.astype(np.int16),
            "threshold": self.threshold.astype(np.float32),
            "left": self.left.astype(np.uint8),
            "right": self.right.astype(np.uint8),
            "value": self.value.astype(np.float32),
            "bias": np.array([self.bias], dtype=np.float32),
        }

    @staticmethod
    def from_arrays(stored: Mapping[str, np.ndarray]) -> Trees:
        """Trees from their stored arrays."""
        index = {name: stored[name].astype(np.int64) for name in ("feature", "left", "right")}
        return Trees(**index, threshold=stored["threshold"], value=stored["value"], bias=float(stored["bias"][0]))


def fit_trees(
    x: Float[np.ndarray, "n features"], y: Bool[np.ndarray, " n"], weight: Float[np.ndarray, " n"], seed: int
) -> Trees:
    """Gradient boosting (Friedman 2001) with scikit-learn."""
    model = booster()(**TREE_SETTINGS, random_state=seed).fit(x.astype(np.float32), y, weight)
    share = np.average(y, weights=weight)
    return _plain(model, float(np.log(share / (1 - share))))


def booster() -> type:
    """scikit-learn's gradient boosting; raises `LocauditError` where that is not installed."""
    try:
        from sklearn.ensemble import GradientBoostingClassifier
    except ImportError:
        raise LocauditError(
            got="a judge to fit but no package scikit-learn",
            expected="scikit-learn installed",
            remedy='pip install "locaudit[judge]"',
        ) from None
    return GradientBoostingClassifier


def _plain(model: Any, bias: float) -> Trees:
    trees = [stage[0].tree_ for stage in model.estimators_]
    n_nodes = max(tree.node_count for tree in trees)
    own = np.arange(n_nodes)
    out = {
        "feature": np.zeros((len(trees), n_nodes), dtype=np.int64),
        "threshold": np.zeros((len(trees), n_nodes), dtype=np.float32),
        "left": np.tile(own, (len(trees), 1)),
        "right": np.tile(own, (len(trees), 1)),
        "value": np.zeros((len(trees), n_nodes), dtype=np.float32),
    }
    for row, tree in enumerate(trees):
        n, inner = tree.node_count, tree.children_left >= 0
        out["feature"][row, :n] = np.where(inner, tree.feature, 0)
        # Inputs are float32: rounding the threshold down keeps every comparison as it was.
        out["threshold"][row, :n] = _floor32(tree.threshold)
        out["left"][row, :n] = np.where(inner, tree.children_left, own[:n])
        out["right"][row, :n] = np.where(inner, tree.children_right, own[:n])
        out["value"][row, :n] = _RATE * tree.value[:, 0, 0]
    return Trees(**out, bias=bias)


def _floor32(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    out = values.astype(np.float32)
    return np.where(out > values, np.nextafter(out, np.float32(-np.inf)), out)
