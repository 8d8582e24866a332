"""Slow twin of `locaudit.measure.drift`: one position at a time, each from its own forward, in float64."""

from __future__ import annotations

import copy

import torch

from locaudit.edits import Edit
from locaudit.measure.tree import Forest
from locaudit.models import Model
from reference.edits import edited_by_hand


@torch.no_grad()
def drift(model: Model, documents: torch.Tensor, edit: Edit | None) -> dict[str, float]:
    """``kl``: mean over positions of sum_v p_0 (log p_0 - log p_edit); ``ce``: mean of -log p_edit(next token)."""
    wide = Model(copy.deepcopy(model.lm).double(), model.tokenizer, model.name)
    kl, ce = [], []
    for document in documents:
        for t in range(len(document)):
            base = _log_probs(wide, document[: t + 1], None)
            after = _log_probs(wide, document[: t + 1], edit)
            kl.append(sum(float(p.exp() * (p - q)) for p, q in zip(base, after, strict=True)))
            if t + 1 < len(document):
                ce.append(-float(after[document[t + 1]]))
    return {"kl": sum(kl) / len(kl), "ce": sum(ce) / len(ce)}


@torch.no_grad()
def drift_on_prompts(model: Model, forest: Forest, edit: Edit | None) -> dict[str, float]:
    """`drift` on each prompt and its first answer, one forward for each."""
    wide = Model(copy.deepcopy(model.lm).double(), model.tokenizer, model.name)
    kl, ce = [], []
    for tree in forest.trees:
        ids = torch.tensor([tree.prompt + tree.branches[0]])
        base = wide.lm(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
        with edited_by_hand(wide, edit, len(tree.prompt), tree.subject):
            after = wide.lm(input_ids=ids, use_cache=False).logits[0].log_softmax(dim=-1)
        kl += (base.exp() * (base - after)).sum(-1).tolist()
        ce += [-float(after[t, token]) for t, token in enumerate(ids[0, 1:])]
    return {"kl": sum(kl) / len(kl), "ce": sum(ce) / len(ce)}


def _log_probs(model: Model, ids: torch.Tensor, edit: Edit | None) -> torch.Tensor:
    """log p(. | ids)."""
    with edited_by_hand(model, edit):
        return model.lm(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -1].log_softmax(dim=-1)
