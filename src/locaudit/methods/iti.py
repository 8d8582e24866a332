"""Inference-time intervention: o' = o + alpha sigma u at the chosen units.

u is a unit vector for each head and sigma the standard deviation of activations along it, both from training questions.
Source: the paper, "Localization and Intervention Using Activation Statistics" (equation 5); Li et al. 2023 (ITI).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.edits import Edit, Positions, SiteEdit
from locaudit.errors import ConfigError
from locaudit.location import Location
from locaudit.measure.activations import Activations
from locaudit.methods.probes import Probes
from locaudit.models import Model, Site

Direction = Literal["mass_mean", "probe", "random"]


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
    """The edit a = 0, c = alpha, b = theta at the location's units, 0 elsewhere."""
    if positions not in ("all", "answer") or not math.isfinite(alpha):
        raise ConfigError(
            got=f"positions {positions!r} and alpha {alpha}",
            expected="'all' or 'answer', and a finite number",
            remedy="change the arguments",
        )
    sites: dict[Site, SiteEdit] = {}
    for site, mask in model.masks(location).items():
        b = torch.where(mask, theta[site[1]].flatten(), 0.0)
        sites[site] = SiteEdit(torch.zeros_like(b), b, float(alpha))
    return Edit(sites, positions)
