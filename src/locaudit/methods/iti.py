"""Inference-time intervention: h' = h + alpha sigma u at the chosen units.

u is a unit vector for each unit (a block of a site's coordinates, such as a head) and sigma the standard deviation of
activations along it, both from training questions.
Source: the paper, "Localization and Intervention Using Activation Statistics" (equation 5); Li et al. 2023 (ITI).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.edits import Edit, Positions, SiteEdit
from locaudit.errors import ConfigError
from locaudit.location import Location, Site
from locaudit.measure.activations import Activations
from locaudit.methods.base import Fit, Job
from locaudit.methods.parameters import onto
from locaudit.methods.probes import Probes
from locaudit.methods.settings import Direction, ITISettings
from locaudit.models import Model


def iti_theta(
    activations: Activations,
    spread: Activations | None = None,
    *,
    direction: Direction = "mass_mean",
    probes: Probes | None = None,
    seed: int = 0,
) -> Float[Tensor, "layers units width"]:
    """Theta = sigma u of every unit.

    ``mass_mean``: u is the mean activation of true answers minus that of false ones; ``probe``: the probe's weight
    (needs `probes`); ``random``: uniform on the sphere, from `seed`. sigma is the standard deviation (of the
    population, as the reference has it) of `spread`'s activations along u, of `activations`' own when it is None. A
    unit whose activations do not vary gets theta = 0.
    """
    x, y = activations.values, activations.is_true
    if direction == "mass_mean":
        raw = x[y].mean(dim=0) - x[~y].mean(dim=0)
    elif direction == "probe":
        if probes is None:
            raise TypeError("direction='probe' needs probes")
        raw = probes.weight.float()
    elif direction == "random":
        raw = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(seed))
    else:
        raise ConfigError(
            got=f"the direction {direction!r}", expected="'mass_mean', 'probe' or 'random'", remedy="name one of them"
        )
    u = torch.nn.functional.normalize(raw, dim=-1)
    along = torch.einsum("nluw,luw->nlu", (activations if spread is None else spread).values, u)
    return along.std(dim=0, correction=0).unsqueeze(-1) * u


def iti_edit(
    model: Model,
    location: Location,
    theta: Float[Tensor, "layers units width"],
    *,
    alpha: float,
    positions: Positions = "answer",
) -> Edit:
    """The edit A = 0, c = alpha, B = theta at the location's units, 0 elsewhere."""
    if positions not in ("all", "answer") or not math.isfinite(alpha):
        raise ConfigError(
            got=f"positions {positions!r} and alpha {alpha}",
            expected="'all' or 'answer', and a finite number",
            remedy="change the arguments",
        )
    sites: dict[Site, SiteEdit] = {}
    for site, subspace in model.subspaces(location).items():
        b = onto(subspace, theta[site.layer].reshape(-1, 1)).squeeze(1)
        sites[site] = SiteEdit.rank_one(torch.zeros_like(b), b, alpha)
    return Edit(sites, positions)


def prepare(preparing: Any, settings: ITISettings) -> dict[str, Tensor]:
    """``theta`` of every unit, from training questions (`locaudit.run.prepare.Preparing`).

    Raises `ConfigError` for a kind of place that is no blocks of coordinates.
    """
    if preparing.blocks is None:
        raise ConfigError(
            got=f"ITI at a place of kind {preparing.kind}",
            expected="a kind whose units are blocks of coordinates, such as head",
            remedy="leave the method out",
        )
    probes = preparing.probes if settings.direction == "probe" else None
    return {
        "theta": iti_theta(
            preparing.activations,
            preparing.spread,
            direction=settings.direction,
            probes=probes,
            seed=preparing.config.seed,
        )
    }


def fit(
    shared: Any, jobs: Sequence[Job], settings: ITISettings, on_step: Callable[[int, int], None] | None = None
) -> list[Fit]:
    """The edit of each job, alpha its strength; `shared` holds the `model` and what `prepare` made."""
    theta = shared.prepared["iti"]["theta"]
    return [
        Fit(iti_edit(shared.model, job.location, theta, alpha=job.strength or 0.0, positions=settings.positions))
        for job in jobs
    ]
