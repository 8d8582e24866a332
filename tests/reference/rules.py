"""Slow twin of `locaudit.methods.rules`: one row for each (question, answer), and each token's gradient by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from locaudit.edits import Edit
from locaudit.location import Positions, Site
from locaudit.measure.tree import Forest, Tree
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


@torch.no_grad()
def replaced_margin(
    model: Model,
    forest: Forest,
    n_true: Sequence[int],
    site: Site,
    coordinates: Tensor,
    new: Tensor | Sequence[Tree],
    positions: Positions,
    size: float = 1.0,
) -> float:
    """`margin` with h' = h + size (new - h) in some coordinates of a site: `new` is a vector, or the paired prompts.

    Of a paired prompt, the token is taken that is as far from the end of prompt and answer.
    """

    def run(ids: tuple[int, ...], change) -> Tensor:
        handle = model.hook(site, change)
        try:
            return torch.log_softmax(model.lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double(), -1)
        finally:
            handle.remove()

    total = 0.0
    for number, (tree, n) in enumerate(zip(forest.trees, n_true, strict=True)):
        prompt, n_prefix = forest.prefix + tree.prompt, len(forest.prefix)
        for branch, answer in enumerate(tree.branches):
            end, last = len(prompt) + len(answer), len(prompt) - 1
            tokens = {"all": range(end), "prompt": range(last + 1), "answer": range(last, end), "last": [last]}
            tokens["subject"] = [n_prefix + (tree.subject or 0)]
            seen = []
            if not isinstance(new, Tensor):
                run(forest.prefix + new[number].prompt + answer, lambda h, seen=seen: seen.append(h.clone()) or h)

            def change(h: Tensor, tokens=tokens[positions], seen=seen, end=end) -> Tensor:
                h = h.clone()
                wide = h.view(end, -1)
                for t in tokens:
                    other = seen[0].view(-1, wide.shape[1])[t - end] if seen else new
                    wide[t, coordinates] += size * (other - wide[t])[coordinates]
                return h

            logs = run(prompt + answer, change)
            share = (1 / n if branch < n else -1 / (len(tree.branches) - n)) / len(forest.trees)
            total += share * sum(float(logs[len(prompt) + t - 1, token]) for t, token in enumerate(answer))
    return total
