"""Check on a run's own questions that answer trees and separate rows give the same log-probabilities.

`locaudit.models.identity` checks this on a few tokens when a model is loaded. But positions and attention of some
models change with the length of a text or of a row. Therefore it is checked again, once per run, on the questions on
which it is most likely to fail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from locaudit.edits import stack, zero_edit
from locaudit.errors import ModelError
from locaudit.location import SITES, Site
from locaudit.measure.forward import ROW_LENGTH, answer_log_probs, last_states, state_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, pack
from locaudit.models import Model
from locaudit.models.identity import tolerance


def hardest_trees(forests: Sequence[Forest]) -> Forest:
    """The tree with the longest path (primer, prompt and answer), and the trees that share the widest row with it."""
    forest = max((forest for forest in forests if forest.trees), key=lambda forest: forest.depth)
    lengths = [len(tree) for tree in forest.trees]
    widest = max(pack(lengths, ROW_LENGTH), key=lambda row: sum(lengths[i] for i in row))
    deepest = max(range(len(lengths)), key=lambda i: Forest((), forest.trees[i : i + 1]).depth)
    return Forest(forest.prefix, tuple(forest.trees[i] for i in dict.fromkeys((deepest, *widest))))


@torch.no_grad()
def check_trees(model: Model, forest: Forest) -> float:
    """Compare log p(answer) in trees and in separate rows. Returns the largest difference per token, in nats.

    Trees run as in trials: after the cached prefix, several in a row, under an edit with B = 0 from the middle layer
    on, and starting at that layer's cached residual stream. Separate rows run without any of these. At most three
    answers of `hardest_trees` are compared: the longest one, and those that are last in their rows. Raises `ModelError`
    if the results differ by more than `tolerance`.
    """
    sites = [Site(name, model.n_layers // 2) for name in SITES if name not in model.lacks]  # type: ignore[arg-type]
    bank = stack(model, [zero_edit(model, sites)]) if sites else None
    sums = answer_log_probs(model, forest, bank, residuals=Residuals(model, forest))
    first, last = forest.trees[0], forest.trees[-1]
    longest = max(range(len(first.branches)), key=lambda i: len(first.branches[i]))
    chosen = {(0, longest), (0, len(first.branches) - 1), (len(forest.trees) - 1, len(last.branches) - 1)}
    worst = 0.0
    for number, answer in sorted(chosen):
        branch = forest.trees[number].branches[answer]
        ids = torch.tensor([forest.prefix + forest.trees[number].prompt + branch], device=model.device)
        states = last_states(model, input_ids=ids, use_cache=False)[0, -len(branch) - 1 : -1]
        alone = state_log_probs(model, states, torch.arange(len(branch)), ids[0, -len(branch) :]).sum()
        worst = max(worst, abs(float(sums[number][0, answer]) - float(alone)) / len(branch))
    if worst > tolerance(model):  # NaN is refused with the unedited model's log-probabilities, by question
        raise ModelError(
            got=f"{model.name} ({model.config.model_type}), whose log-probabilities of answers differ by {worst:.2g} "
            f"nats per token between a tree and separate rows (text of {forest.depth} tokens, of which "
            f"{len(forest.prefix)} are the primer's)",
            expected=f"a difference of at most {tolerance(model):.1g}, as rounding gives",
            remedy="use a shorter primer or none (prompt.primer), or another model: positions or attention of this one "
            "depend on the length of a text",
        )
    return worst
