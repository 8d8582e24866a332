"""Slow twin of `locaudit.measure`: one row for each (question, answer); no padding, no cache, no tree, no bank."""

from __future__ import annotations

import torch

from locaudit.edits import Edit
from locaudit.measure.tree import Forest, Tree
from locaudit.models import Model
from reference.edits import edited_by_hand


@torch.no_grad()
def answer_log_prob(
    model: Model,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    edit: Edit | None = None,
    subject: int | None = None,
) -> float:
    """log p(answer | prompt) = sum_t log p(answer_t | prompt, answer_<t), in nats."""
    ids = torch.tensor([prompt + answer], device=model.device)
    with edited_by_hand(model, edit, n_prompt=len(prompt), subject=subject):
        logits = model.lm(input_ids=ids, use_cache=False).logits[0]
    # In float64: torch's float32 log_softmax over 49,152 logits is off by about 1e-5 a token on some CPUs.
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return sum(float(log_probs[len(prompt) + t - 1, token]) for t, token in enumerate(answer))


def forest_log_probs(model: Model, forest: Forest, edit: Edit | None = None) -> list[torch.Tensor]:
    """`answer_log_prob` of every branch of every tree, the prefix put back in front of each prompt."""
    return [
        torch.tensor(
            [
                answer_log_prob(model, forest.prefix + tree.prompt, branch, edit, subject_of(forest, tree))
                for branch in tree.branches
            ]
        )
        for tree in forest.trees
    ]


def subject_of(forest: Forest, tree: Tree) -> int | None:
    """Index of the subject's last token in the whole prompt."""
    return None if tree.subject is None else len(forest.prefix) + tree.subject
