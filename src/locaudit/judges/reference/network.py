"""A small network that compares an answer's tokens with the tokens of true and of false references.

Decomposable attention (Parikh et al. 2016) on frozen states: for the projected answer token a_i and the projected
tokens r_j of one side,

    t_i = sum_j softmax_j(q(a_i) . k(r_j) / sqrt(d)) r_j        c_i = gelu(W [a_i, t_i, a_i - t_i, a_i * t_i])

Comparisons with both sides and their difference are pooled over the answer's tokens by learned weights and by the
mean; the answer's last and mean token and the dense features join them. Deviation: self-comparison and both sides
share their weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu

WIDTH, HIDDEN, DENSE = 96, 64, 48
EPOCHS, BATCH, RATE, DECAY, DROPOUT, WARMUP = 6, 4, 1e-3, 0.02, 0.3, 30


@dataclass(frozen=True)
class Group:
    """Answers to one question, as the network reads them."""

    prompt: Float[Tensor, "prompt_tokens d"]
    """Standardised states."""
    answers: tuple[Float[Tensor, "tokens d"], ...]
    """Standardised states of each answer, the line break behind it last."""
    sees: Bool[Tensor, "answers 2 prompt_tokens"]
    """Tokens of true and of false references that an answer is compared with."""
    dense: Float[Tensor, "answers features"]
    """Standardised."""


class Comparer(nn.Module):
    """Two log-odds for each answer of a group: truth and info."""

    def __init__(self, d_states: int, n_dense: int):
        super().__init__()
        self.project = nn.Linear(d_states, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.compare = nn.Linear(4 * WIDTH, WIDTH)
        self.dense = nn.Linear(n_dense, DENSE)
        self.attend = nn.Linear(4 * WIDTH, 1)
        self.hidden = nn.Linear(DENSE + 8 * WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, 2)
        self.drop, self.drop_dense = nn.Dropout(DROPOUT), nn.Dropout(0.1)

    def forward(self, group: Group) -> Float[Tensor, "answers 2"]:
        """Log-odds."""
        lengths = torch.tensor([len(answer) for answer in group.answers])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        last = lengths.cumsum(0) - 1
        # The line break carries no words; an empty answer has nothing else.
        is_body = torch.ones(len(owner), dtype=torch.bool)
        is_body[last[lengths > 1]] = False
        body = (owner[None] == torch.arange(len(lengths))[:, None]) & is_body
        share = body / body.sum(1, keepdim=True)
        a = self.project(self.drop(torch.cat(group.answers).float()))
        p = self.project(self.drop(group.prompt.float()))
        score = self.query(a) @ self.key(p).T / math.sqrt(WIDTH)
        sides = [self._compared(a, p, score, group.sees[owner, side]) for side in (0, 1)]
        c = torch.cat([*sides, sides[0] - sides[1]], dim=1)
        weight = self.attend(torch.cat([c, a], dim=1)).T.masked_fill(~body, -1e4).softmax(1)
        pooled = [gelu(self.dense(self.drop_dense(group.dense))), a[last], share @ a, weight @ c, share @ c]
        return self.out(self.drop(gelu(self.hidden(self.drop(torch.cat(pooled, dim=1))))))

    def _compared(self, a: Tensor, p: Tensor, score: Tensor, sees: Bool[Tensor, "tokens prompt_tokens"]) -> Tensor:
        t = (score.masked_fill(~sees, -1e4).softmax(1) * sees.any(1, keepdim=True)) @ p
        return gelu(self.compare(torch.cat([a, t, a - t, a * t], dim=1)))


def fit_network(
    groups: Sequence[Group],
    labels: Sequence[Float[Tensor, "answers 2"]],
    weights: Sequence[Float[Tensor, "answers 2"]],
    seed: int,
) -> Comparer:
    """Weighted cross-entropy with AdamW, one-cycle cosine rate, batches of whole questions."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)  # dropout draws from the global generator; its state is put back
    try:
        return _train(groups, labels, weights, random.Random(seed))
    finally:
        torch.random.set_rng_state(state)


def _train(groups, labels, weights, rng: random.Random) -> Comparer:
    network = Comparer(groups[0].prompt.shape[1], groups[0].dense.shape[1]).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    n_steps = math.ceil(len(groups) / BATCH) * EPOCHS
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / WARMUP) * max(0.02, (1 + math.cos(math.pi * i / n_steps)) / 2)
    )
    for _ in range(EPOCHS):
        order = rng.sample(range(len(groups)), len(groups))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            n = sum(len(labels[i]) for i in batch)
            for i in batch:
                loss = binary_cross_entropy_with_logits(network(groups[i]), labels[i], weights[i], reduction="sum") / n
                loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return network.eval()
