"""A user's edit from a file, and its null: the same norm in random directions of the same place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.edits import Edit, SiteEdit, load_edit
from locaudit.errors import ConfigError, LocationError
from locaudit.methods.base import Fit, Job
from locaudit.methods.parameters import Subspace, onto
from locaudit.methods.settings import GivenSettings
from locaudit.records import content_hash


def fit(
    shared: Any, jobs: Sequence[Job], settings: GivenSettings, on_step: Callable[[int, int], None] | None = None
) -> list[Fit]:
    """The file's edit, or `Job.draw` random directions for it; `shared` holds the `model`.

    Raises `ConfigError` without a file, `DataError` for one that holds no edit, `LocationError` for an edit that acts
    outside the job's location.
    """
    if settings.file is None:
        raise ConfigError(got="no edit", expected="its file", remedy="set methods.given.file")
    edit = load_edit(settings.file)
    return [Fit(_at(edit, shared.model.subspaces(job.location), job)) for job in jobs]


def random_directions(site: SiteEdit, subspace: Subspace, generator: torch.Generator) -> SiteEdit:
    """The site's edit with each column of B, and the mean of an ablation, turned to a random direction of the subspace.

    Directions are uniform on the subspace's sphere, norms as before.
    """

    def turned(columns: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
        drawn = onto(subspace, torch.randn(columns.shape, generator=generator))
        return torch.nn.functional.normalize(drawn, dim=0) * columns.norm(dim=0)

    changed = replace(site, b=turned(site.b))
    if site.mask is None or site.mean is None:
        return changed
    inside = (site.mean * site.mask).unsqueeze(1)  # the rest of the mean is not used
    return replace(changed, mean=turned(inside).squeeze(1))


def _at(edit: Edit, subspaces: dict[Any, Subspace], job: Job) -> Edit:
    for site, e in edit.sites.items():
        subspace = subspaces.get(site, torch.zeros(len(e.b), dtype=torch.bool))
        written = e.b if e.mask is None else torch.cat([e.b, e.mask.float().unsqueeze(1)], dim=1)
        if len(subspace) != len(e.b) or (onto(subspace, written) - written).norm() > 1e-4 * written.norm():
            raise LocationError(
                got=f"an edit of {site[0]} in layer {site[1]} that writes outside of {job.location}",
                expected="an edit of the location that is audited",
                remedy="name the place that the edit writes to as the claim",
            )
    if job.draw is None:
        return edit
    seed = int(content_hash({"seed": job.seed, "draw": job.draw}), 16) >> 1
    generator = torch.Generator().manual_seed(seed)
    return replace(
        edit,
        sites={site: random_directions(e, subspaces[site], generator) for site, e in sorted(edit.sites.items())},
    )
