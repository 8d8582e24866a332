"""How closely an answer's tokens match the tokens of each reference, by the cosine of their states.

For states u_i of the answer and v_j of reference r, both standardised and of unit length, as in BERTScore
(Zhang et al. 2020):

    precision_r = mean_i max_j u_i . v_j      recall_r = mean_j max_i u_i . v_j
"""

from __future__ import annotations

from collections.abc import Set

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locaudit.judges.reference.reader import Prompt

N_ALIGNMENT = 16
"""Features of one layer."""
_FAR = -1.0


def alignment_features(
    states: Float[Tensor, "layers tokens d"],
    prompt: Prompt,
    prompt_states: Float[Tensor, "layers prompt_tokens d"],
    hidden: Set[int] = frozenset(),
) -> Float[Tensor, " layers*{N_ALIGNMENT}"]:
    """Features of an answer's tokens against the references of its prompt, without those in `hidden`.

    States of both are standardised and of unit length. A side without references counts as cosine -1.
    """
    n_references = prompt.n_true + prompt.n_false
    kept = torch.tensor([number not in hidden for number in range(n_references)])
    cosine = states @ prompt_states.transpose(1, 2)  # (layers, tokens, prompt tokens)
    member = prompt.segment[None] == torch.arange(n_references)[:, None]  # (references, prompt tokens)
    by_reference = torch.where(member, cosine[:, :, None], _FAR).amax(3)  # (layers, tokens, references)
    precision = by_reference.mean(1)
    recall = cosine.amax(1) @ member.float().T / member.sum(1).clamp(min=1)
    both = precision + recall
    harmonic = torch.where(both > 0, 2 * precision * recall / (both + 1e-6), 0.0)
    pair = torch.stack([precision, recall, harmonic], dim=2)  # (layers, references, 3)
    is_true = torch.arange(n_references) < prompt.n_true
    best, mean, near = zip(*(_side(pair, by_reference, kept & side) for side in (is_true, ~is_true)), strict=True)
    lead = near[0] - near[1]
    own = [lead.mean(1), lead.amax(1), lead.amin(1), lead[:, -1], near[0].amin(1), near[1].amin(1), mean[0] - mean[1]]
    return torch.cat([best[0], best[1], best[0] - best[1], torch.stack(own, dim=1)], dim=1).flatten()


def _side(
    pair: Float[Tensor, "layers references 3"],
    by_reference: Float[Tensor, "layers tokens references"],
    kept: Bool[Tensor, " references"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Best reference, mean F over references, and each token's nearest reference token."""
    if not kept.any():
        layers, tokens, _ = by_reference.shape
        return torch.full((layers, 3), _FAR), torch.full((layers,), _FAR), torch.full((layers, tokens), _FAR)
    return pair[:, kept].amax(1), pair[:, kept, 2].mean(1), by_reference[:, :, kept].amax(2)
