"""Rules that rank places by how promising they are, from training questions only.

    probe             held-out accuracy of a linear probe (`locaudit.methods.probes`)
    mean-difference   |m+ - m-| / s,   s^2 = sum_i |x_i - m(y_i)|^2 / (n - 2)
    gradient          D = sum over tokens of <dm/da, new - a>
    patching          D = m(new) - m(a)

Here x_i is the unit's activation at the last token of question and answer i, m+ and m- are the means over true and
false answers, m(y_i) is the one of them that i belongs to, and s is the pooled spread.

For the last two, a is the unit's output at the patched tokens (`Preparing.positions`) of prompts and answers, and m the
margin in nats: the mean over questions of log pi(y+|x) - log pi(y-|x), where each side is a mean over the question's
answers. D is the change of the margin if a is replaced by `new`: its mean over all tokens of the training texts (mean
ablation), or its value at the same token after the question's paired prompt (`Preparing.pairs`). ``patching`` runs the
model once per unit. ``gradient`` is the same to first order, for all units in one forward and backward pass:
attribution patching (Nanda 2023; Syed, Rager and Conmy 2023). Units are ranked by |D|. After mean ablation, a unit with
D < 0 raises the preference for true answers where it is now, and one with D > 0 lowers it; an edit may use either.

A rule returns a tensor (layers, units). It gets a `locaudit.run.prepare.Preparing`, as `Method.prepare` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.claims.ranking import units_of
from locaudit.edits import EditBank
from locaudit.edits.hooks import blended, record
from locaudit.location import ROLES, Location, Site, Unit
from locaudit.measure.forward import (
    Prefix,
    Start,
    branch_sums,
    collate_bank,
    forest_batches,
    run_prefix,
    run_trees,
    token_log_probs,
)
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import TreeBatch
from locaudit.methods.ablate import read_means
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
    """First-order change of the margin (nats) if a unit's output is replaced.

    Each unit's output is h + g (new - h), with a gate g that is 0. D is the derivative of the margin by g.
    """
    model, weights = preparing.model, _weights(preparing)
    n_units, width = preparing.blocks
    means = _read_means(preparing)
    sites = [Site(KINDS[preparing.kind].site, layer) for layer in range(model.n_layers)]
    gates = torch.zeros(model.n_layers, n_units, requires_grad=True)
    _ = model.head  # finding the head runs a forward, which must not happen under the hooks
    preparing.say("reading gradients of the training questions")
    for rows, batch in forest_batches(model, preparing.forest, row_tokens=of_device(PART_TOKENS, model.device)):
        every = {site: gates[site.layer].repeat_interleave(width).unsqueeze(0) for site in sites}  # (1, d)
        (sums,) = _answer_sums(preparing, rows, batch, every, means)
        (sums * torch.cat([weights[i] for row in rows for i in row]).to(sums.device)).sum().backward()
    assert gates.grad is not None
    return gates.grad


@torch.no_grad()
def patching(preparing: Any) -> Scores:
    """Change of the margin (nats) if a unit's output is replaced, one unit at a time."""
    model, forest, weights = preparing.model, preparing.forest, _weights(preparing)
    n_units, _ = preparing.blocks
    means = _read_means(preparing)
    residuals = Residuals(model, forest)

    def margins(units: Sequence[Unit]) -> Float[Tensor, " units"]:
        masks = [model.subspaces(Location((unit,), preparing.kind)) for unit in units]
        sites = sorted({site for mask in masks for site in mask})
        none = {site: torch.zeros(model.width(site), device=model.site_device(site)) for site in sites}
        gates = {site: torch.stack([mask.get(site, none[site]).to(none[site]) for mask in masks]) for site in sites}
        k, lowest, total = max(len(units), 1), min((layer for _, layer in sites), default=0), torch.zeros(1)
        for rows, batch in forest_batches(model, forest, k):
            start = residuals.start(lowest, rows, batch.input_ids.shape[1], k)
            sums = _answer_sums(preparing, rows, batch, gates, means, k, start)  # (k, answers)
            total = total + sums.cpu().double() @ torch.cat([weights[i] for row in rows for i in row]).double()
        return total

    units, size = units_of(preparing.kind, model.n_layers, n_units), of_device(BANK, model.device)
    found = [margins([])]
    for start in range(0, len(units), size):
        if start % (size * -(-len(units) // (10 * size))) == 0:  # about ten times
            preparing.say(f"replaced {start} of {len(units)} {KINDS[preparing.kind].plural}")
        found.append(margins(units[start : start + size]) - found[0])
    return torch.cat(found[1:]).view(-1, n_units)


def _weights(preparing: Any) -> list[Float[Tensor, " answers"]]:
    """For each tree, what its answers' log-probabilities are multiplied with, so that the sum is the margin."""
    n = len(preparing.questions)
    return [
        torch.tensor([1 / len(q.true)] * len(q.true) + [-1 / len(q.false)] * len(q.false)) / n
        for q in preparing.questions
    ]


def _read_means(preparing: Any) -> dict[Site, Float[Tensor, " d"]]:
    """What replaces outputs if questions have no paired prompts."""
    return {} if preparing.pairs else read_means(preparing)


def _answer_sums(
    preparing: Any,
    rows: Sequence[Sequence[int]],
    batch: TreeBatch,
    gates: Mapping[Site, Float[Tensor, "k d"]],
    means: Mapping[Site, Float[Tensor, " d"]],
    k: int = 1,
    start: Start | None = None,
) -> Float[Tensor, "k answers"]:
    """Log-probabilities of the answers of a batch, with h + g (new - h) at its patched tokens, for each of `k` gates g.

    The batch has the `rows` of trees once for each gate.
    """
    model, wanted = preparing.model, ROLES[preparing.positions]
    of_row = torch.arange(k, device=model.device).repeat_interleave(len(rows))  # (k rows,): 0 0 1 1
    if preparing.pairs:
        # The primer is the same before both prompts: there is nothing to replace in it.
        prefix = run_prefix(model, preparing.forest.prefix, None)
        found = _read_pairs(preparing, rows, batch.input_ids.shape[1], list(gates), prefix)
        new, cached = {site: x.repeat(k, 1, 1) for site, x in found.items()}, torch.zeros_like(of_row)
    else:
        new, cached, is_prompt = means, of_row, bool(wanted & ROLES["prompt"])
        with blended(model, {site: (g.unsqueeze(1) * is_prompt, means[site]) for site, g in gates.items()}):
            # A bank without sites: the primer runs once for each gate.
            prefix = run_prefix(model, preparing.forest.prefix, EditBank({}, ("all",) * k), start)
    on = ((batch.roles & wanted) != 0).unsqueeze(-1)  # (k rows, tokens, 1)
    of_token = {
        site: g.index_select(0, of_row.to(g.device)).unsqueeze(1) * on.to(g.device) for site, g in gates.items()
    }
    with blended(model, {site: (g, new[site]) for site, g in of_token.items()}):
        logs = token_log_probs(model, batch, None, cached, prefix, start)
    return branch_sums(batch, logs).view(k, -1)


@torch.no_grad()
def _read_pairs(
    preparing: Any, rows: Sequence[Sequence[int]], n_tokens: int, sites: Sequence[Site], prefix: Prefix | None
) -> dict[Site, Float[Tensor, "rows tokens d"]]:
    """Outputs after the paired prompts, each at the column that its token's counterpart has in a batch of `rows`.

    A prompt and its pair are aligned at their ends. Columns without a counterpart, which are not patched, are 0.
    """
    model, trees, pairs = preparing.model, preparing.forest.trees, preparing.pairs
    here, there = [], []  # (row, column) of each token, in the batch and in that of the pairs
    for number, row in enumerate(rows):
        own = other = 0
        for i in row:
            own, other = own + len(trees[i]), other + len(pairs[i])
            for back in range(1, min(len(trees[i]), len(pairs[i])) + 1):
                here.append((number, own - back))
                there.append((number, other - back))
    batch = collate_bank([[pairs[i] for i in row] for row in rows], 1, len(preparing.forest.prefix), model)
    at, target = torch.tensor(there).T, torch.tensor(here).T
    with record(model, sites, (at[0], at[1])) as seen:
        run_trees(model, batch, prefix=prefix)
    found = {}
    for site, x in seen.items():  # x: (n, d)
        found[site] = x.new_zeros(len(rows), n_tokens, x.shape[1])
        found[site][target[0].to(x.device), target[1].to(x.device)] = x
    return found
