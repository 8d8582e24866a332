"""Log-probabilities of given tokens from hidden states, without storing all logits.

    log p(y | h) = z_y - log sum_v exp z_v,    z = W h (+ bias),    d log p(y | h) / dh = W_y - sum_v p_v W_v

The vocabulary is processed in blocks with a running maximum, as in FlashAttention's softmax. If a gradient is needed,
the same pass also accumulates sum_v p_v W_v, so that the backward pass needs no logits. With a logit cap s (Gemma 2),
z becomes s tanh(z / s), and each W_v in the gradient is multiplied by the slope 1 - tanh^2(z_v / s).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from locaudit.models import Head
from locaudit.models.memory import of_device

BLOCK_BYTES = {"cpu": 2**20, "cuda": 256 * 2**20}
"""Size of one block of float32 logits, by device. On a CPU, it is small enough to stay in the CPU's cache."""


def head_log_probs(
    hidden: Float[Tensor, "m d"], head: Head, which: Int[Tensor, " n"], token: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probability (nats, float32) of ``token[i]`` given the hidden state ``hidden[which[i]]``.

    First derivatives with respect to `hidden` are supported, second derivatives are not.
    """
    return _HeadLogProbs.apply(hidden, head, which, token)  # type: ignore[return-value]


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Head, which: Tensor, token: Tensor) -> Tensor:  # type: ignore[override]
        logsumexp, mean = _normaliser(hidden, head, ctx.needs_input_grad[0])  # (m,), (m, d) or None
        rows = head.weight.index_select(0, token).float()  # (n, d): W_y
        # Rounded like the logits in `_normaliser`; otherwise the probability of a likely token could exceed 1.
        logit = (hidden.index_select(0, which).float() * rows).sum(dim=1).to(hidden.dtype).float()
        if head.bias is not None:
            logit = logit + head.bias.index_select(0, token).float()
        if head.softcap is not None:
            capped = head.softcap * torch.tanh(logit / head.softcap)
            # From here on `rows` is dz_y/dh.
            rows = rows * (1 - (capped / head.softcap) ** 2).unsqueeze(1)
            logit = capped
        if mean is not None:
            ctx.save_for_backward(rows, mean, which)
            ctx.dtype = hidden.dtype
        return logit - logsumexp.index_select(0, which)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        rows, mean, which = ctx.saved_tensors
        # (n, d): gradient_i (dz_y/dh - sum_v p_v dz_v/dh); predictions from the same hidden state add up.
        delta = gradient.unsqueeze(1) * (rows - mean.index_select(0, which))
        return torch.zeros_like(mean).index_add_(0, which, delta).to(ctx.dtype), None, None, None


def _normaliser(hidden: Tensor, head: Head, with_mean: bool) -> tuple[Float[Tensor, " m"], Float[Tensor, "m d"] | None]:
    """The log-sum-exp of the logits for each of the m hidden states and, if `with_mean`, sum_v p_v dz_v/dh."""
    m, d = hidden.shape
    block = max(256, of_device(BLOCK_BYTES, hidden.device) // (4 * max(m, 1)))
    top = hidden.new_full((m,), -torch.inf, dtype=torch.float32)
    total = torch.zeros_like(top)
    mean = hidden.new_zeros(m, d, dtype=torch.float32) if with_mean else None
    for start in range(0, len(head.weight), block):
        weight = head.weight[start : start + block]
        z = (hidden @ weight.T).float()  # (m, block)
        if head.bias is not None:
            z += head.bias[start : start + block].float()
        slope = None
        if head.softcap is not None:
            slope = 1 - z.div_(head.softcap).tanh_() ** 2
            z *= head.softcap
        # The sums so far are relative to the old maximum: rescale them to the new one before adding this block.
        new = torch.maximum(top, z.amax(dim=1))  # (m,)
        scale = torch.exp(top - new)
        p = z.sub_(new.unsqueeze(1)).exp_()
        total = total * scale + p.sum(dim=1)
        if mean is not None:
            p = p if slope is None else p * slope
            mean.mul_(scale.unsqueeze(1)).add_(p.to(weight.dtype) @ weight)
        top = new
        del z, p, slope  # before the next block is made
    return top + total.log(), None if mean is None else mean / total.unsqueeze(1)
