"""Mean ablation of a location: h' has the mean of h in the location's subspace, and is h outside it.

With P the subspace's basis, h' = h + P P^T (mean - h). Coordinates are stored as a mask and a mean, which is exact in
every dtype; any other basis as matrices, A = -P^T, B = P, c = P^T mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.edits import Edit, SiteEdit
from locaudit.edits.hooks import record
from locaudit.location import Site
from locaudit.measure.forward import check_depth, forest_batches, run_prefix, run_trees
from locaudit.measure.tree import Forest
from locaudit.methods.base import Fit, Job
from locaudit.methods.parameters import Subspace
from locaudit.methods.settings import AblateSettings
from locaudit.models import Model
from locaudit.registry import KINDS


def prepare(preparing: Any, settings: AblateSettings) -> dict[str, Tensor]:
    """``SITE.LAYER`` -> mean (d,) of the site's vectors over all tokens of the training texts, for every layer."""
    name = KINDS[preparing.kind].site
    sites = [Site(name, layer) for layer in range(preparing.model.n_layers)]
    preparing.say(f"reading mean activations ({name})")
    return {
        f"{site.name}.{site.layer}": x for site, x in collect_means(preparing.model, preparing.forest, sites).items()
    }


def fit(
    shared: Any, jobs: Sequence[Job], settings: AblateSettings, on_step: Callable[[int, int], None] | None = None
) -> list[Fit]:
    """The ablation of each job's location; `shared` holds the `model` and what `prepare` made."""
    means = shared.prepared["ablate"]
    return [
        Fit(Edit({site: mean_ablation(subspace, means[f"{site.name}.{site.layer}"])
                  for site, subspace in shared.model.subspaces(job.location).items()}))
        for job in jobs
    ]  # fmt: skip


def mean_ablation(subspace: Subspace, mean: Float[Tensor, " d"]) -> SiteEdit:
    """The edit of one site that puts the mean in place of what h has in the subspace."""
    width = len(mean)
    if subspace.dtype == torch.bool:
        return SiteEdit(mean.new_zeros(0, width), mean.new_zeros(width, 0), mean.new_zeros(0), subspace, mean)
    return SiteEdit(-subspace.T, subspace, subspace.T @ mean)


@torch.no_grad()
def collect_means(
    model: Model, forest: Forest, sites: Sequence[Site], *, row_tokens: int | None = None
) -> dict[Site, Float[Tensor, " d"]]:
    """Mean of each site's vectors over all tokens of the forest's prompts and answers, float32, on the CPU.

    A prompt counts once, and so does what a question's answers begin with in common; the prefix of all prompts, if
    there is one, does not count.
    """
    check_depth(model, forest)
    totals = {site: torch.zeros(model.width(site), dtype=torch.float64) for site in sites}
    n_tokens = [len(tree.read.tokens) for tree in forest.trees]
    prefix = run_prefix(model, forest.prefix, None)
    for rows, batch in forest_batches(model, forest, row_tokens=row_tokens, ends=True):
        filled = torch.tensor([sum(n_tokens[i] for i in row) for row in rows])
        row, token = (torch.arange(batch.input_ids.shape[1]) < filled.unsqueeze(1)).nonzero(
            as_tuple=True
        )  # padding left out
        with record(model, sites, (row, token)) as seen:
            run_trees(model, batch, prefix=prefix)
        for site in sites:
            totals[site] += seen[site].double().sum(dim=0).cpu()
    return {site: (total / sum(n_tokens)).float() for site, total in totals.items()}
