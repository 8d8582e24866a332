"""Inference-time intervention (ITI): h' = h + alpha sigma u at each unit of the location.

A unit is a block of a site's coordinates, such as a head. Its direction u has norm 1, and sigma is the standard
deviation of its activations along u. Both come from training questions.
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
from locaudit.measure.activations import Activations, check_finite
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
    """The vector theta = sigma u of every unit of the model.

    `direction` chooses u, which is then normalised:

        mass_mean   mean activation of true answers minus mean activation of false answers
        probe       weight of the unit's probe (needs `probes`)
        random      uniform on the unit sphere, from `seed`

    sigma is the population standard deviation (dividing by n, as in ITI's code) along u of the activations in `spread`,
    or of `activations` themselves if `spread` is None. A unit whose activations do not vary gets theta = 0.
    Raises `ModelError` for activations that are NaN or infinite.
    """
    # x (n, layers, units, width), y (n,); u (layers, units, width)
    spread = activations if spread is None else spread
    for read in (activations, spread):
        check_finite(read)
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
            got=f"the direction {direction!r}", expected="'mass_mean', 'probe' or 'random'", remedy="choose one of them"
        )
    u = torch.nn.functional.normalize(raw, dim=-1)
    along = torch.einsum("nluw,luw->nlu", spread.values, u)  # (n, layers, units)
    return along.std(dim=0, correction=0).unsqueeze(-1) * u


def iti_edit(
    model: Model,
    location: Location,
    theta: Float[Tensor, "layers units width"],
    *,
    alpha: float,
    positions: Positions = "answer",
) -> Edit:
    """The edit h' = h + alpha theta: A = 0, c = alpha, and B is theta at the location's units and 0 elsewhere.

    Raises `ConfigError` for other positions or an alpha that is not finite.
    """
    if positions not in ("all", "answer") or not math.isfinite(alpha):
        raise ConfigError(
            got=f"positions {positions!r} and alpha {alpha}",
            expected="positions 'all' or 'answer', and a finite alpha",
            remedy="correct the one that is wrong",
        )
    sites: dict[Site, SiteEdit] = {}
    for site, subspace in model.subspaces(location).items():
        # The layer's theta (units, width) as one column (d, 1), set to 0 outside the location.
        b = onto(subspace, theta[site.layer].reshape(-1, 1)).squeeze(1)
        sites[site] = SiteEdit.rank_one(torch.zeros_like(b), b, alpha)
    return Edit(sites, positions)


def prepare(preparing: Any, settings: ITISettings) -> dict[str, Tensor]:
    """Compute ``theta`` of every unit from the training questions (`locaudit.run.prepare.Preparing`).

    Raises `ConfigError` for a kind of place whose units are not blocks of coordinates.
    """
    if preparing.blocks is None:
        raise ConfigError(
            got=f"the method iti with places of the kind {preparing.kind}",
            expected="a kind whose units are blocks of coordinates, such as head",
            remedy="leave iti out of the methods",
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
    """The ITI edit of each job, with its strength as alpha and the theta that `prepare` computed."""
    theta = shared.prepared["iti"]["theta"]
    return [
        Fit(iti_edit(shared.model, job.location, theta, alpha=job.strength or 0.0, positions=settings.positions))
        for job in jobs
    ]
