"""Log-ratios of answers, from which the training losses are computed, and default learning rates.

With the log-ratio r(y) = log pi_edit(y|x) - log pi_0(y|x) of an answer, and the margin h = r(y+) - r(y-) of a pair:

    IPO  (h - 1 / (2 tau))^2          Azar et al. 2024, equation 17, and the paper that this library implements
    DPO  -log sigmoid(beta h)         Rafailov et al. 2023, equation 7

The losses themselves are in `locaudit.registry.OBJECTIVES`. They are minimised, although the paper prints argmax in
front of IPO's sum. The paper's log-ratios are sums over answer tokens (``reduction="sum"``); TRL's IPO divides each by
the answer's length (``"mean"``). This matters: IPO's target margin 1 / (2 tau) is in nats per answer with ``sum`` and
in nats per token with ``mean``.
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
    """Log-ratio r(y) of each answer, in nats.

    `edited` and `reference` are log-probabilities of the answers, summed over tokens. The reduction ``mean`` divides
    the log-ratio by the answer's length in tokens.
    """
    ratio = edited - reference
    return ratio / lengths if reduction == "mean" else ratio


LEARNING_RATES: dict[str, tuple[tuple[int, float], ...]] = {
    "pair": ((1, 2e-3), (16, 5e-4), (1024, 1e-4)),
    "question": ((1, 2e-2), (16, 1e-2), (1024, 3e-3)),
}
"""Anchors (size of the location in heads, learning rate) for each way of batching."""


def default_learning_rate(batching: Batching, heads_worth: float, n_heads: float) -> float:
    """Learning rate for a location whose size is `heads_worth` heads, in a model of `n_heads` heads.

    With ``pair`` batching, the paper's rates: 2e-3 for 1 head, 5e-4 for 16 and 1e-4 for all 1024 heads of its model.
    With ``question`` batching, the rates of docs/learning-rates.md at the same sizes. Between these sizes the rate is
    interpolated linearly on logarithmic scales. The whole model always gets the last rate.
    """
    anchors = LEARNING_RATES[batching]
    if heads_worth < n_heads:
        for (low, low_rate), (high, high_rate) in zip(anchors, anchors[1:], strict=False):
            if heads_worth <= high:
                t = math.log(max(heads_worth, low) / low) / math.log(high / low)
                return low_rate * (high_rate / low_rate) ** t
    return anchors[-1][1]
