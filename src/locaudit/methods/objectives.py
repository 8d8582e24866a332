"""What the losses over (true, false) answer pairs need, and the learning rates that go with them.

With r(y) = log pi_edit(y|x) - log pi_0(y|x) and the margin h = r(y+) - r(y-):

    IPO  (h - 1 / (2 tau))^2          the paper, "Fitting the Alignment Objective"; Azar et al. 2024, equation 17
    DPO  -log sigmoid(beta h)         Rafailov et al. 2023, equation 7

(`locaudit.registry.OBJECTIVES`). The paper prints argmax in front of IPO's sum; the loss is minimised. Its log-ratios
are sums over answer tokens (``reduction="sum"``); TRL's IPO divides each by its own length (``"mean"``). The two aim at
very different edits: 1 / (2 tau) is a margin in nats per answer, or per token.
"""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor

from locaudit.methods.settings import Batching, Reduction


def log_ratios(
    edited: Float[Tensor, " answers"],
    reference: Float[Tensor, " answers"],
    lengths: Int[Tensor, " answers"],
    reduction: Reduction,
) -> Float[Tensor, " answers"]:
    """r(y) of each answer from summed log-probabilities; ``mean`` divides by the answer's length in tokens."""
    ratio = edited - reference
    return ratio / lengths if reduction == "mean" else ratio


LEARNING_RATES: dict[str, tuple[tuple[int, float], ...]] = {
    "pair": ((1, 2e-3), (16, 5e-4), (1024, 1e-4)),
    "question": ((1, 2e-2), (16, 1e-2), (1024, 3e-3)),
}
"""(location's size in heads, learning rate) anchors for each way of batching."""


def default_learning_rate(batching: Batching, heads_worth: float, n_heads: float) -> float:
    """Learning rate for a location that is worth so many heads, of a model that is worth `n_heads` in all.

    ``pair``: the paper's 2e-3 for 1 head, 5e-4 for 16, 1e-4 for all 1024 of its model; ``question``: the rates of
    docs/learning-rates.md at the same anchors. Between anchors the logarithm of the rate is linear in that of the size,
    and the whole model always takes the last anchor.
    """
    anchors = LEARNING_RATES[batching]
    if heads_worth < n_heads:
        for (low, low_rate), (high, high_rate) in zip(anchors, anchors[1:], strict=False):
            if heads_worth <= high:
                t = math.log(max(heads_worth, low) / low) / math.log(high / low)
                return low_rate * (high_rate / low_rate) ** t
    return anchors[-1][1]
