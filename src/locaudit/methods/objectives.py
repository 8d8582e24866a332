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

import numpy as np
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


LEARNING_RATES: dict[str, tuple[float, float, float]] = {
    "pair": (2e-3, 5e-4, 1e-4),
    "question": (2e-2, 1e-2, 1.5e-3),
}
"""Learning rates of one head, 16 heads and the whole model for each way of batching."""
FULL_PAIRS = 4
"""Pairs in a step from which on the rates of ``question`` batching hold; with fewer, they fall."""


def default_learning_rate(batching: Batching, heads_worth: float, n_heads: float, pairs: float = FULL_PAIRS) -> float:
    """Learning rate for a location of the size of `heads_worth` heads, in a model of `n_heads` heads.

    It falls continuously with size: its logarithm is linear in the logarithm of the size between one head, 16 heads and
    the whole model. A location of nearly the whole model thus gets nearly its rate. In a model of fewer than 16^2 heads
    the rate of 16 heads is left out, so that the curve is not steep at its end.

    With ``pair`` batching, the rates are the paper's: 2e-3 for one head, 5e-4 for 16 and 1e-4 for all 1024 heads of its
    model. Those of ``question`` batching are from docs/learning-rates.md. The gradient of a step of few `pairs` (their
    mean number) is noisy: with fewer than `FULL_PAIRS`, these rates are multiplied by sqrt(pairs / FULL_PAIRS).
    """
    one, some, whole = LEARNING_RATES[batching]
    sizes, rates = ([1, 16, n_heads], [one, some, whole]) if n_heads >= 16**2 else ([1, n_heads], [one, whole])
    share = math.sqrt(min(pairs / FULL_PAIRS, 1)) if batching == "question" else 1.0
    if n_heads <= 1:
        return share * whole
    return share * math.exp(np.interp(math.log(heads_worth), np.log(sizes), np.log(rates)))
