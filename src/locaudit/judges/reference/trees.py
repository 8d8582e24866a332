"""Gradient-boosted trees as plain arrays, evaluated with numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

DEPTH = 4
"""Depth of the trees: splits on the path to the deepest leaf."""


@dataclass(frozen=True)
class Trees:
    """Gradient-boosted trees: log-odds = bias + sum_t value[t, leaf_t(x)].

    Node i of tree t sends x to ``left[t, i]`` if ``x[feature[t, i]] <= threshold[t, i]``, else to ``right[t, i]``. The
    root is node 0. A leaf points to itself, so `DEPTH` steps reach the leaf of every x.
    """

    feature: Int[np.ndarray, "trees nodes"]
    threshold: Float[np.ndarray, "trees nodes"]
    left: Int[np.ndarray, "trees nodes"]
    right: Int[np.ndarray, "trees nodes"]
    value: Float[np.ndarray, "trees nodes"]
    bias: Float[np.ndarray, " 1"]

    def __call__(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, " n"]:
        """Log-odds of each row of x."""
        x = x.astype(np.float32)
        # (1, trees) and (n, 1), so that indexing with both gives (n, trees)
        trees, rows = np.arange(len(self.feature))[None], np.arange(len(x))[:, None]
        node = np.zeros((len(x), len(self.feature)), dtype=np.int64)  # (n, trees): current node, from the root
        for _ in range(DEPTH):
            goes_left = x[rows, self.feature[trees, node]] <= self.threshold[trees, node]
            node = np.where(goes_left, self.left[trees, node], self.right[trees, node])
        return float(self.bias[0]) + self.value[trees, node].sum(1)
