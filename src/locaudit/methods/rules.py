"""Rules that rank places by how promising they are, from training questions only.

    probe             held-out accuracy of a linear probe (`locaudit.methods.probes`)
    mean-difference   |m+ - m-| / s,   s^2 = sum_i |x_i - m(y_i)|^2 / (n - 2)
    gradient          D = sum over tokens of <dm/da, mean - a>
    patching          D = m(mean) - m(a)

Here x_i is the unit's activation at the last token of question and answer i, m+ and m- are the means over true and
false answers, m(y_i) is the one of them that i belongs to, and s is the pooled spread.

For the last two, a is the unit's output at every token of prompts and answers, and m the margin in nats: the mean over
questions of log pi(y+|x) - log pi(y-|x), where each side is a mean over the question's answers. D is the change of the
margin if a is replaced by its mean over the tokens of the training texts (mean ablation). ``patching`` runs the model
once per unit. ``gradient`` is the same to first order, for all units in one forward and backward pass: attribution
patching (Nanda 2023; Syed, Rager and Conmy 2023). Units are ranked by |D|. A unit with D < 0 raises the preference for
true answers where it is now, and one with D > 0 lowers it; an edit may use either.

A rule returns a tensor (layers, units). It gets a `locaudit.run.prepare.Preparing`, as `Method.prepare` does.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.claims.ranking import units_of
from locaudit.edits import Edit, stack
from locaudit.edits.hooks import blended
from locaudit.location import Location, Unit
from locaudit.measure.forward import answer_log_probs, branch_sums, forest_batches, run_prefix, token_log_probs
from locaudit.measure.residual import Residuals
from locaudit.methods.ablate import mean_ablation, read_means
from locaudit.methods.training import PART_TOKENS
from locaudit.models.memory import of_device
from locaudit.registry import KINDS

BANK = {"cpu": 4, "cuda": 32}
"""Device -> units that are replaced in the rows of one batch, each in rows of its own."""
Scores = Float[Tensor, "layers units"]


def probe(preparing: Any) -> Scores:
    """Accuracy of each unit's linear probe on the held-out part of the training questions."""
    probes = preparing.probes
    preparing.say(f"always guessing the larger class is right in {probes.majority:.3f} of {probes.n_val} examples")
    return probes.val_accuracy


def mean_difference(preparing: Any) -> Scores:
    """Distance of each unit's two class means, in units of the pooled spread; 0 if the means are equal."""
    x, is_true = preparing.activations.values.double(), preparing.activations.is_true  # x: (n, layers, units, width)
    parts = x[is_true], x[~is_true]
    means = [part.mean(dim=0) for part in parts]  # (layers, units, width)
    first, second = ((part - mean).square().sum(dim=(0, -1)) for part, mean in zip(parts, means, strict=True))
    distance = (means[0] - means[1]).norm(dim=-1)  # (layers, units)
    return torch.where(distance > 0, distance / ((first + second) / (len(x) - 2)).sqrt(), 0.0)


@torch.inference_mode(False)
@torch.enable_grad()
def gradient(preparing: Any) -> Scores:
    """First-order change of the margin (nats) if a unit's output is replaced by its mean.

    Each unit's output is h + g (mean - h), with a gate g that is 0. D is the derivative of the margin by g.
    """
    model, forest, weights = preparing.model, preparing.forest, _weights(preparing)
    n_units, width = preparing.blocks
    means = read_means(preparing)
    gates = torch.zeros(model.n_layers, n_units, requires_grad=True)
    _ = model.head  # finding the head runs a forward, which must not happen under the hooks
    preparing.say("reading gradients of the training questions")
    for rows, batch in forest_batches(model, forest, row_tokens=of_device(PART_TOKENS, model.device)):
        every = {site: (gates[site.layer].repeat_interleave(width), mean) for site, mean in means.items()}
        with blended(model, every):
            prefix = run_prefix(model, forest.prefix, None)
            logs = token_log_probs(model, batch, None, batch.input_ids.new_zeros(len(batch.input_ids)), prefix)
        sums = branch_sums(batch, logs)  # (answers,), in the order of the rows' trees
        (sums * torch.cat([weights[i] for row in rows for i in row]).to(sums.device)).sum().backward()
    assert gates.grad is not None
    return gates.grad


@torch.no_grad()
def patching(preparing: Any) -> Scores:
    """Change of the margin (nats) if a unit's output is replaced by its mean, one unit at a time."""
    model, forest, weights = preparing.model, preparing.forest, _weights(preparing)
    n_units, _ = preparing.blocks
    means = read_means(preparing)
    residuals = Residuals(model, forest)

    def margins(edits: list[Edit]) -> Float[Tensor, " edits"]:
        sums = answer_log_probs(model, forest, stack(model, edits) if edits else None, residuals=residuals)
        return torch.stack([x.double() @ w.double() for x, w in zip(sums, weights, strict=True)]).sum(dim=0)

    def replaced(unit: Unit) -> Edit:
        subspaces = model.subspaces(Location((unit,), preparing.kind))
        return Edit({site: mean_ablation(subspace, means[site]) for site, subspace in subspaces.items()})

    units, size = units_of(preparing.kind, model.n_layers, n_units), of_device(BANK, model.device)
    found = [margins([])]
    for start in range(0, len(units), size):
        if start % (size * -(-len(units) // (10 * size))) == 0:  # about ten times
            preparing.say(f"replaced {start} of {len(units)} {KINDS[preparing.kind].plural}")
        found.append(margins([replaced(unit) for unit in units[start : start + size]]) - found[0])
    return torch.cat(found[1:]).view(-1, n_units)


def _weights(preparing: Any) -> list[Float[Tensor, " answers"]]:
    """For each tree, what its answers' log-probabilities are multiplied with, so that the sum is the margin."""
    n = len(preparing.questions)
    return [
        torch.tensor([1 / len(q.true)] * len(q.true) + [-1 / len(q.false)] * len(q.false)) / n
        for q in preparing.questions
    ]
