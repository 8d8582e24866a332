"""Slow twin of `locaudit.measure.generation`: one prompt, one edit, no cache, the whole row at every step."""

from __future__ import annotations

import torch

from locaudit.edits import Edit
from locaudit.models import Model
from reference.edits import edited_by_hand


@torch.no_grad()
def greedy(
    model: Model,
    prompt: tuple[int, ...],
    edit: Edit | None,
    n_new: int,
    ends: set[int],
    marker: str = "Q:",
    subject: int | None = None,
) -> tuple[int, ...]:
    """The new tokens, up to and with the one that ends the answer."""
    ids = list(prompt)
    for _ in range(n_new):
        with edited_by_hand(model, edit, n_prompt=len(prompt), subject=subject):
            logits = model.lm(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        text = model.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        if ids[-1] in ends or marker in text:
            break
    return tuple(ids[len(prompt) :])
