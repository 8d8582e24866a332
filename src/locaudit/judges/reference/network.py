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

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from locaudit.judges.reference.features import Read

WIDTH, HIDDEN, DENSE, DROPOUT = 96, 64, 48, 0.3


class Comparer(nn.Module):
    """Two log-odds for each answer of a question: truth and info."""

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

    def forward(self, read: Read, dense: Float[Tensor, "answers features"]) -> Float[Tensor, "answers 2"]:
        """Log-odds. `dense` are the standardised features."""
        lengths = torch.tensor([len(answer) for answer in read.answers])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (tokens,) of all answers
        last = lengths.cumsum(0) - 1
        # The line break carries no words; an empty answer has nothing else.
        is_body = torch.ones(len(owner), dtype=torch.bool)
        is_body[last[lengths > 1]] = False
        body = (owner[None] == torch.arange(len(lengths))[:, None]) & is_body  # (answers, tokens)
        share = body / body.sum(1, keepdim=True)
        a = self.project(self.drop(torch.cat(read.answers).float()))  # (tokens, width)
        p = self.project(self.drop(read.prompt.float()))  # (prompt tokens, width)
        score = self.query(a) @ self.key(p).T / math.sqrt(WIDTH)  # (tokens, prompt tokens)
        sides = [self._compared(a, p, score, read.sees[owner, side]) for side in (0, 1)]
        c = torch.cat([*sides, sides[0] - sides[1]], dim=1)  # (tokens, 3 width)
        weight = self.attend(torch.cat([c, a], dim=1)).T.masked_fill(~body, -1e4).softmax(1)  # (answers, tokens)
        pooled = [gelu(self.dense(self.drop_dense(dense))), a[last], share @ a, weight @ c, share @ c]
        return self.out(self.drop(gelu(self.hidden(self.drop(torch.cat(pooled, dim=1))))))

    def _compared(self, a: Tensor, p: Tensor, score: Tensor, sees: Bool[Tensor, "tokens prompt_tokens"]) -> Tensor:
        t = (score.masked_fill(~sees, -1e4).softmax(1) * sees.any(1, keepdim=True)) @ p
        return gelu(self.compare(torch.cat([a, t, a - t, a * t], dim=1)))
