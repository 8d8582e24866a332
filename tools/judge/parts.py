"""Train the parts of the reference judge: networks with PyTorch, trees with scikit-learn."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from locaudit.judges.reference.features import Read
from locaudit.judges.reference.network import Comparer
from locaudit.judges.reference.trees import DEPTH, Trees

EPOCHS, BATCH, RATE, DECAY, WARMUP = 6, 4, 1e-3, 0.02, 30
"""Training of networks: epochs, questions per batch, peak learning rate, weight decay, warm-up steps."""
TREE_SETTINGS = {
    "n_estimators": 250,
    "max_depth": DEPTH,
    "learning_rate": 0.06,
    "subsample": 0.5,
    "max_features": 0.15,
    "min_samples_leaf": 15,
}
"""Settings of scikit-learn's `GradientBoostingClassifier`, by its names."""


def fit_network(
    inputs: Sequence[tuple[Read, Tensor]], labels: Sequence[Tensor], weights: Sequence[Tensor], seed: int
) -> Comparer:
    """Train a network by weighted cross-entropy, with AdamW, warm-up and cosine decay, in batches of whole questions.

    `inputs` has for each question what was read and its standardised features; `labels` and `weights` are (answers, 2)
    per question.
    """
    rng = random.Random(seed)
    with torch.random.fork_rng():  # initial weights and dropout draw from the global generator
        torch.manual_seed(seed)
        network = Comparer(inputs[0][0].prompt.shape[1], inputs[0][1].shape[1]).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
        n_steps = math.ceil(len(inputs) / BATCH) * EPOCHS
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(1, (i + 1) / WARMUP) * max(0.02, (1 + math.cos(math.pi * i / n_steps)) / 2)
        )
        for _ in range(EPOCHS):
            order = rng.sample(range(len(inputs)), len(inputs))
            for start in range(0, len(order), BATCH):
                batch = order[start : start + BATCH]
                n = sum(len(labels[i]) for i in batch)
                for i in batch:
                    logits = network(*inputs[i])
                    (binary_cross_entropy_with_logits(logits, labels[i], weights[i], reduction="sum") / n).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return network.eval()


def fit_trees(x: np.ndarray, y: np.ndarray, weight: np.ndarray, seed: int) -> Trees:
    """Gradient boosting (Friedman 2001) of labels y (n,) on features x (n, features), stored as plain arrays."""
    from sklearn.ensemble import GradientBoostingClassifier

    model: Any = GradientBoostingClassifier(**TREE_SETTINGS, random_state=seed).fit(x.astype(np.float32), y, weight)
    share = np.average(y, weights=weight)
    trees = [stage[0].tree_ for stage in model.estimators_]
    shape = len(trees), max(tree.node_count for tree in trees)
    # (trees, nodes) arrays; a node points to itself unless it is split.
    own = np.arange(shape[1])
    feature, threshold, value = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    left, right = np.tile(own, (shape[0], 1)), np.tile(own, (shape[0], 1))
    for row, tree in enumerate(trees):
        n, inner = tree.node_count, tree.children_left >= 0
        feature[row, :n] = np.where(inner, tree.feature, 0)
        # Inputs are float32, so rounding the float64 threshold down to float32 leaves every comparison unchanged.
        rounded = tree.threshold.astype(np.float32)
        threshold[row, :n] = np.where(rounded > tree.threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)
        left[row, :n] = np.where(inner, tree.children_left, own[:n])
        right[row, :n] = np.where(inner, tree.children_right, own[:n])
        value[row, :n] = TREE_SETTINGS["learning_rate"] * tree.value[:, 0, 0]
    return Trees(feature, threshold, left, right, value, np.array([np.log(share / (1 - share))], np.float32))
