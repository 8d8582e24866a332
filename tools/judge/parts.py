"""Train the networks of the reference judge."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from locaudit.judges.reference.features import Read
from locaudit.judges.reference.network import Comparer

EPOCHS, BATCH, RATE, DECAY, WARMUP = 6, 8, 1e-3, 0.02, 30
"""Training: epochs, examples per batch (two per question), peak learning rate, weight decay, warm-up steps."""


def fit_network(
    inputs: Sequence[tuple[Read, Tensor]], labels: Sequence[Tensor], weights: Sequence[Tensor], seed: int
) -> Comparer:
    """Train a network by weighted cross-entropy, with AdamW, warm-up and cosine decay, in batches of whole examples.

    `inputs` has for each example what was read and its standardised features; `labels` and `weights` are (answers, 2)
    per example.
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
