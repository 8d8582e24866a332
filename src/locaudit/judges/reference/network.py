"""A small network that compares an answer's tokens with the tokens of true and of false references.

Decomposable attention (Parikh et al. 2016) on frozen hidden states. Let a_i be a projected answer token and r_j the
projected tokens of one side (true or false references), both of width d. Then

    t_i = sum_j softmax_j(q(a_i) . k(r_j) / sqrt(d)) r_j        (what the side says about token i)
    c_i = gelu(W [a_i, t_i, a_i - t_i, a_i * t_i])

The c_i of both sides, and their difference, are pooled over the answer's tokens by learned weights and by the mean. The
answer's last token, its mean token and the dense features are appended, and a two-layer network gives the log-odds.
Deviation: both sides share all weights.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from locaudit.judges.reference.features import Read

WIDTH, HIDDEN, DENSE, DROPOUT = 96, 64, 48, 0.3
"""Width d of projected tokens, of the hidden layer, of the projected dense features; dropout probability."""


class Comparer(nn.Module):
    """Log-odds of truth and of info for each answer to a question.

    `d_states` is the width of the states in `Read`, `n_dense` the number of dense features.
    """

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
        """Log-odds. `dense` are the standardised features of the same answers.

        The tokens of all answers are concatenated: "tokens" below counts those of every answer to the question.
        """
        lengths = torch.tensor([len(answer) for answer in read.answers])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (tokens,): which answer
        last = lengths.cumsum(0) - 1  # (answers,): index of each answer's line break
        # The line break is not part of an answer's words, unless the answer is empty and has nothing else.
        is_body = torch.ones(len(owner), dtype=torch.bool)
        is_body[last[lengths > 1]] = False
        body = (owner[None] == torch.arange(len(lengths))[:, None]) & is_body  # (answers, tokens)
        share = body / body.sum(1, keepdim=True)  # (answers, tokens): weights of the mean over an answer
        a = self.project(self.drop(torch.cat(read.answers).float()))  # (tokens, width)
        p = self.project(self.drop(read.prompt.float()))  # (prompt tokens, width)
        score = self.query(a) @ self.key(p).T / math.sqrt(WIDTH)  # (tokens, prompt tokens)
        sides = [self._compared(a, p, score, read.sees[owner, side]) for side in (0, 1)]
        c = torch.cat([*sides, sides[0] - sides[1]], dim=1)  # (tokens, 3 width)
        weight = self.attend(torch.cat([c, a], dim=1)).T.masked_fill(~body, -1e4).softmax(1)  # (answers, tokens)
        # Per answer: DENSE + last (WIDTH) + mean (WIDTH) + attended c (3 WIDTH) + mean c (3 WIDTH)
        pooled = [gelu(self.dense(self.drop_dense(dense))), a[last], share @ a, weight @ c, share @ c]
        return self.out(self.drop(gelu(self.hidden(self.drop(torch.cat(pooled, dim=1))))))

    def _compared(self, a: Tensor, p: Tensor, score: Tensor, sees: Bool[Tensor, "tokens prompt_tokens"]) -> Tensor:
        """The c_i of answer tokens a (tokens, width) and the prompt tokens p that they see: (tokens, width)."""
        # A token that sees nothing, because a side has no references, gets t = 0.
        t = (score.masked_fill(~sees, -1e4).softmax(1) * sees.any(1, keepdim=True)) @ p
        return gelu(self.compare(torch.cat([a, t, a - t, a * t], dim=1)))
