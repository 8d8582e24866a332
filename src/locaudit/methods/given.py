"""A user's own edit from a file. Its controls are random directions of the same norm at the same place.

If the claim is directions itself, controls are the same edit turned into the control's directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.claims import find_kind, parse_location
from locaudit.claims.directions import Directions
from locaudit.edits import Edit, SiteEdit, load_edit
from locaudit.errors import LocationError
from locaudit.location import Site
from locaudit.methods.base import Fit, Job
from locaudit.methods.parameters import Subspace, onto
from locaudit.methods.settings import GivenSettings
from locaudit.records import content_hash


def fit(
    shared: Any, jobs: Sequence[Job], settings: GivenSettings, on_step: Callable[[int, int], None] | None = None
) -> list[Fit]:
    """The edit in the file. If a job has a `draw`, the same edit in random directions (`random_directions`).

    At a control V' (d, k) of a claim of directions V, B becomes V' V^T B, which has the same norm.

    Raises `ConfigError` if no file is set, `DataError` if the file is not an edit, and `LocationError` if the edit
    changes anything outside the job's location.
    """
    settings.check()
    edit, model, fits = load_edit(str(settings.file)), shared.model, []
    for job in jobs:
        is_direction = isinstance(find_kind(job.location), Directions)
        claim = parse_location(shared.config.claim) if is_direction else job.location
        own = model.subspaces(claim)
        found = _at(edit, own, replace(job, location=claim))
        fits.append(Fit(found if job.location == claim else _turned(found, own, model.subspaces(job.location))))
    return fits


def _turned(edit: Edit, own: dict[Site, Subspace], new: dict[Site, Subspace]) -> Edit:
    """The edit with B turned from one span of directions into another."""
    sites = {site: replace(e, b=new[site] @ (own[site].T @ e.b)) for site, e in edit.sites.items()}
    return replace(edit, sites=sites)


def random_directions(site: SiteEdit, subspace: Subspace, generator: torch.Generator) -> SiteEdit:
    """Replace each column of B, and an ablation's mean, by a random direction in the subspace with the same norm.

    Directions are uniform on the unit sphere of the subspace.
    """

    def turned(columns: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
        drawn = onto(subspace, torch.randn(columns.shape, generator=generator))
        return torch.nn.functional.normalize(drawn, dim=0) * columns.norm(dim=0)

    changed = replace(site, b=turned(site.b))
    if site.mask is None or site.mean is None:
        return changed
    inside = (site.mean * site.mask).unsqueeze(1)  # (d, 1); outside the mask the mean is not used
    return replace(changed, mean=turned(inside).squeeze(1))


def _at(edit: Edit, subspaces: dict[Any, Subspace], job: Job) -> Edit:
    for site, e in edit.sites.items():
        subspace = subspaces.get(site, torch.zeros(len(e.b), dtype=torch.bool))
        # The columns (d, r) or (d, r + 1) that the edit writes to: B, and the mask of an ablation.
        written = e.b if e.mask is None else torch.cat([e.b, e.mask.float().unsqueeze(1)], dim=1)
        if len(subspace) != len(e.b) or (onto(subspace, written) - written).norm() > 1e-4 * written.norm():
            raise LocationError(
                got=f"an edit of {site[0]} in layer {site[1]} that writes outside of {job.location}",
                expected="an edit of the claimed location only",
                remedy="claim the place that the edit writes to",
            )
    if job.draw is None:
        return edit
    seed = int(content_hash({"seed": job.seed, "draw": job.draw}), 16) >> 1
    generator = torch.Generator().manual_seed(seed)
    return replace(
        edit,
        sites={site: random_directions(e, subspaces[site], generator) for site, e in sorted(edit.sites.items())},
    )
