"""How closely an answer's tokens match the tokens of each reference: cosine similarity of hidden states.

As in BERTScore (Zhang et al. 2020), with hidden states u_i of the answer's tokens and v_j of the tokens of reference r,
standardised and scaled to unit length:

    precision_r = mean_i max_j u_i . v_j      recall_r = mean_j max_i u_i . v_j
"""

from __future__ import annotations

from collections.abc import Set

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.judges.reference.reader import Prompt

_FAR = -1.0
"""Smallest possible cosine: stands in where there is nothing to compare with."""


def alignment_features(
    states: Float[Tensor, "layers tokens d"],
    prompt: Prompt,
    prompt_states: Float[Tensor, "layers prompt_tokens d"],
    hidden: Set[int] = frozenset(),
) -> Float[Tensor, " layers*16"]:
    """Features that compare an answer's tokens with the true and the false references of its prompt.

    `states` are those of the answer, `prompt_states` those of the prompt, both standardised and of unit length. The
    references whose numbers are in `hidden` are ignored. A side (true or false) without references counts as cosine -1.

    Per layer 16, with F the harmonic mean of precision and recall and m_i the best cosine of token i on a side:

        3  max over true references of precision, recall, F
        3  the same over false references
        3  their difference
        7  mean, max, min and last of m_i(true) - m_i(false); min m_i(true); min m_i(false); difference of the mean F
    """
    n_references = prompt.n_true + prompt.n_false
    kept = torch.tensor([number not in hidden for number in range(n_references)])
    cosine = states @ prompt_states.transpose(1, 2)  # (layers, tokens, prompt tokens)
    member = prompt.segment[None] == torch.arange(n_references)[:, None]  # (references, prompt tokens)
    # Best cosine of each answer token within each reference: (layers, tokens, references)
    by_reference = torch.where(member, cosine[:, :, None], _FAR).amax(3)
    precision = by_reference.mean(1)  # (layers, references)
    # Best cosine of each prompt token over the answer, averaged within each reference: (layers, references)
    recall = cosine.amax(1) @ member.float().T / member.sum(1).clamp(min=1)
    both = precision + recall
    harmonic = torch.where(both > 0, 2 * precision * recall / (both + 1e-6), 0.0)
    pair = torch.stack([precision, recall, harmonic], dim=2)  # (layers, references, 3)
    is_true = torch.arange(n_references) < prompt.n_true  # true references come first
    sides = kept & is_true, kept & ~is_true  # (references,) each
    best = [pair.masked_fill(~side[:, None], _FAR).amax(1) for side in sides]  # (layers, 3) each
    near = [by_reference.masked_fill(~side, _FAR).amax(2) for side in sides]  # (layers, tokens) each
    nothing = pair.new_full((len(pair),), _FAR)  # (layers,): the mean F of a side without references
    mean = [pair[:, side, 2].mean(1) if side.any() else nothing for side in sides]
    lead = near[0] - near[1]  # (layers, tokens)
    own = [lead.mean(1), lead.amax(1), lead.amin(1), lead[:, -1], near[0].amin(1), near[1].amin(1), mean[0] - mean[1]]
    # (layers, 3 + 3 + 3 + 7) -> (layers * 16,)
    return torch.cat([best[0], best[1], best[0] - best[1], torch.stack(own, dim=1)], dim=1).flatten()
