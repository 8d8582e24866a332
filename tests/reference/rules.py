"""Slow twin of `locaudit.methods.rules`: one row for each (question, answer), and each token's gradient by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locaudit.edits import Edit
from locaudit.location import Site
from locaudit.measure.tree import Forest
from locaudit.models import Model
from reference.scoring import forest_log_probs


def margin(model: Model, forest: Forest, n_true: Sequence[int], edit: Edit | None = None) -> float:
    """Mean over questions of mean log p(true answer) - mean log p(false answer), in nats."""
    sums = forest_log_probs(model, forest, edit)
    return sum(float(x[:n].mean() - x[n:].mean()) for x, n in zip(sums, n_true, strict=True)) / len(sums)


def attribution(
    model: Model, forest: Forest, n_true: Sequence[int], means: Mapping[Site, Tensor]
) -> dict[Site, Tensor]:
    """Site -> sum over tokens of (mean - a) * d margin / d a, of each coordinate (d,)."""
    total = {site: torch.zeros(len(mean)) for site, mean in means.items()}
    for tree, n in zip(forest.trees, n_true, strict=True):
        prompt = forest.prefix + tree.prompt
        for number, answer in enumerate(tree.branches):
            share = (1 / n if number < n else -1 / (len(tree.branches) - n)) / len(forest.trees)
            seen, handles = {}, []

            def keep(a: Tensor, site: Site, seen=seen) -> Tensor:
                seen[site] = a.detach().requires_grad_() if site not in seen and not a.requires_grad else a
                seen[site].retain_grad()
                return seen[site]

            for site in means:
                handles.append(model.hook(site, lambda a, site=site, keep=keep: keep(a, site)))
            try:
                with torch.enable_grad():
                    logits = model.lm(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
                    logs = torch.log_softmax(logits.double(), dim=-1)
                    score = sum(logs[len(prompt) + t - 1, token] for t, token in enumerate(answer))
                    (share * score).backward()
            finally:
                for handle in handles:
                    handle.remove()
            for site, a in seen.items():
                h, slope = (x.detach().view(-1, len(means[site])) for x in (a, a.grad))
                total[site] += ((means[site] - h) * slope).sum(dim=0)
    return total
