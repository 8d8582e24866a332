"""Mean ablation: in the location's subspace, h is replaced by its mean; outside it, h is unchanged.

With an orthonormal basis P (d, k) of the subspace, h' = h + P P^T (mean - h). If the subspace is a set of coordinates,
the edit is stored as a mask and a mean, which is exact in every dtype. For any other subspace, it is stored as
matrices: A = -P^T, B = P, c = P^T mean.
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
    """``SITE.LAYER`` -> mean vector (d,) of the site in this layer, over all tokens of the training texts."""
    return {f"{site.name}.{site.layer}": mean for site, mean in read_means(preparing).items()}


def read_means(preparing: Any) -> dict[Site, Float[Tensor, " d"]]:
    """The mean of the kind's site in every layer, over all tokens of the training texts."""
    sites = [Site(KINDS[preparing.kind].site, layer) for layer in range(preparing.model.n_layers)]
    preparing.say(f"reading mean activations ({sites[0].name})")
    return collect_means(preparing.model, preparing.forest, sites)


def fit(
    shared: Any, jobs: Sequence[Job], settings: AblateSettings, on_step: Callable[[int, int], None] | None = None
) -> list[Fit]:
    """The mean ablation of each job's location, with the means that `prepare` computed (``shared.prepared``)."""
    means = shared.prepared["ablate"]
    return [
        Fit(Edit({site: mean_ablation(subspace, means[f"{site.name}.{site.layer}"])
                  for site, subspace in shared.model.subspaces(job.location).items()}))
        for job in jobs
    ]  # fmt: skip


def mean_ablation(subspace: Subspace, mean: Float[Tensor, " d"]) -> SiteEdit:
    """The edit of one site that replaces h by its mean in the subspace."""
    width = len(mean)
    if subspace.dtype == torch.bool:
        return SiteEdit(mean.new_zeros(0, width), mean.new_zeros(width, 0), mean.new_zeros(0), subspace, mean)
    return SiteEdit(-subspace.T, subspace, subspace.T @ mean)


@torch.no_grad()
def collect_means(
    model: Model, forest: Forest, sites: Sequence[Site], *, row_tokens: int | None = None
) -> dict[Site, Float[Tensor, " d"]]:
    """Mean of each site's vectors over the tokens of the forest's prompts and answers, in float32 on the CPU.

    Each question's prompt counts once, and so do tokens with which several of its answers begin. The prefix that all
    prompts share is left out. `row_tokens` limits the tokens in a forward, with padding.
    """
    check_depth(model, forest)
    totals = {site: torch.zeros(model.width(site), dtype=torch.float64) for site in sites}
    n_tokens = [len(tree.read.tokens) for tree in forest.trees]
    prefix = run_prefix(model, forest.prefix, None)
    for rows, batch in forest_batches(model, forest, row_tokens=row_tokens, ends=True):
        filled = torch.tensor([sum(n_tokens[i] for i in row) for row in rows])  # (rows,): tokens without padding
        # Indices (n,) of all tokens that are not padding.
        row, token = (torch.arange(batch.input_ids.shape[1]) < filled.unsqueeze(1)).nonzero(as_tuple=True)
        with record(model, sites, (row, token)) as seen:
            run_trees(model, batch, prefix=prefix)
        for site in sites:
            totals[site] += seen[site].double().sum(dim=0).cpu()
    return {site: (total / sum(n_tokens)).float() for site, total in totals.items()}
