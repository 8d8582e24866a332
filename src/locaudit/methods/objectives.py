"""Losses over (true, false) answer pairs, and what they need.

With r(y) = log pi_edit(y|x) - log pi_0(y|x) and the margin h = r(y+) - r(y-):

    IPO  (h - 1 / (2 tau))^2          the paper, "Fitting the Alignment Objective"; Azar et al. 2024, equation 17
    DPO  -log sigmoid(beta h)         Rafailov et al. 2023, equation 7

The paper prints argmax in front of IPO's sum; the loss is minimised. Its log-ratios are sums over answer tokens
(``reduction="sum"``); TRL's IPO divides each by its own length (``"mean"``). The two aim at very different edits:
1 / (2 tau) is a margin in nats per answer, or per token.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locaudit.errors import ConfigError

Objective = Literal["ipo", "dpo"]
Reduction = Literal["sum", "mean"]


def pair_loss(margin: Float[Tensor, " pairs"], objective: Objective, strength: float) -> Float[Tensor, " pairs"]:
    """Loss of each pair from its margin h; `strength` is tau of IPO or beta of DPO."""
    match objective:
        case "ipo":
            return (margin - 1 / (2 * strength)) ** 2
        case "dpo":
            return -torch.nn.functional.logsigmoid(strength * margin)
    raise ConfigError(got=f"the objective {objective!r}", expected="'ipo' or 'dpo'", remedy="name one of them")


def log_ratios(
    edited: Float[Tensor, " answers"],
    reference: Float[Tensor, " answers"],
    lengths: Int[Tensor, " answers"],
    reduction: Reduction,
) -> Float[Tensor, " answers"]:
    """r(y) of each answer from summed log-probabilities; ``mean`` divides by the answer's length in tokens."""
    ratio = edited - reference
    return ratio / lengths if reduction == "mean" else ratio


def default_learning_rate(batching: Literal["question", "pair"], n_units: int, n_whole: int) -> float:
    """Learning rate for a location of `n_units` of the model's `n_whole` heads (or neurons).

    ``pair``: the paper's 2e-3 for 1 head, 5e-4 for 16, 1e-4 for all 1024 of its model; ``question``: the rates of
    docs/learning-rates.md at the same anchors. Between anchors the logarithm of the rate is linear in that of the size,
    and the whole model always takes the last anchor.
    """
    anchors = LEARNING_RATES[batching]
    if n_units >= n_whole:
        return anchors[-1][1]
    for (low, low_rate), (high, high_rate) in zip(anchors, anchors[1:], strict=False):
        if n_units <= high:
            t = torch.log(torch.tensor(n_units / low)) / torch.log(torch.tensor(high / low))
            return float(low_rate * (high_rate / low_rate) ** t.item())
    return anchors[-1][1]


LEARNING_RATES: dict[str, tuple[tuple[int, float], ...]] = {
    "pair": ((1, 2e-3), (16, 5e-4), (1024, 1e-4)),
    "question": ((1, 2e-2), (16, 1e-2), (1024, 3e-3)),
}
"""(location size, learning rate) anchors for each way of batching."""
