"""Inference-time intervention (ITI): h' = h + alpha sigma u at each unit of the location.

A unit is a block of a site's coordinates, such as a head. Its direction u has norm 1, and sigma is the standard
deviation of its activations along u. Both come from training questions.
Source: the paper, "Localization and Intervention Using Activation Statistics" (equation 5); Li et al. 2023 (ITI).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.claims import parse_location
from locaudit.edits import Edit, SiteEdit, stack
from locaudit.errors import ConfigError
from locaudit.location import Location, Positions, Site
from locaudit.measure.activations import Activations, check_finite
from locaudit.measure.drift import measure_drift
from locaudit.methods.base import Fit, Job
from locaudit.methods.parameters import onto
from locaudit.methods.probes import Probes
from locaudit.methods.settings import Direction, ITISettings
from locaudit.models import Model

TOLERANCE = 0.03
"""Relative difference between an edit's KL and its dose."""
MOST_TRIES = 16
"""Edits measured at most to find an alpha."""
SEARCHED = 0.25
"""Share of the drift documents on which the search begins; it ends on all of them."""


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
    spread: Mapping[int, Float[Tensor, "n width"]] | None = None,
) -> Edit:
    """The edit h' = h + alpha theta: A = 0, c = alpha, and B is theta at the location's units and 0 elsewhere.

    Where the location is a span of directions, u is the projection of theta onto the span, with norm 1, and sigma the
    standard deviation of the layer's activations in `spread` along it. Raises `ConfigError` for other positions or an
    alpha that is not finite.
    """
    if positions not in get_args(Positions) or not math.isfinite(alpha):
        raise ConfigError(
            got=f"positions {positions!r} and alpha {alpha}",
            expected=f"positions among {', '.join(get_args(Positions))}, and a finite alpha",
            remedy="correct the one that is wrong",
        )
    sites: dict[Site, SiteEdit] = {}
    for site, subspace in model.subspaces(location).items():
        # The layer's theta (units, width) as one column (d, 1), set to 0 outside the location.
        b = onto(subspace, theta[site.layer].reshape(-1, 1)).squeeze(1)
        if subspace.dtype != torch.bool:
            u = torch.nn.functional.normalize(b, dim=0)
            b = ((spread or {})[site.layer] @ u).std(correction=0) * u
        sites[site] = SiteEdit.rank_one(torch.zeros_like(b), b, alpha)
    return Edit(sites, positions)


def prepare(preparing: Any, settings: ITISettings) -> dict[str, Tensor]:
    """Compute ``theta`` of every unit from the training questions (`locaudit.run.prepare.Preparing`).

    If units are not blocks of coordinates, it is that of whole layers, and the activations of layers in which the claim
    is a span are kept as ``spread.LAYER``.
    """
    claim = preparing.config.claim if preparing.blocks is None else None
    spans = [] if claim is None else preparing.model.spans(parse_location(claim))
    probes = preparing.probes if settings.direction == "probe" else None
    return {
        "theta": iti_theta(
            preparing.activations,
            preparing.spread,
            direction=settings.direction,
            probes=probes,
            seed=preparing.config.seed,
        ),
        **{f"spread.{site.layer}": preparing.spread.values[:, site.layer].flatten(1) for site in spans},
    }


def fit(
    shared: Any, jobs: Sequence[Job], settings: ITISettings, on_step: Callable[[int, int], None] | None = None
) -> list[Fit]:
    """The ITI edit of each job, with the theta that `prepare` computed.

    The job's strength is alpha or, with ``doses``, the KL of the unedited from the edited model on the run's drift
    documents, to which `match_doses` finds alpha.
    """
    prepared = shared.prepared["iti"]
    theta = prepared["theta"]
    spread = {int(name.rpartition(".")[2]): x for name, x in prepared.items() if name != "theta"}

    def edit(job: Job, alpha: float) -> Edit:
        return iti_edit(shared.model, job.location, theta, alpha=alpha, positions=settings.positions, spread=spread)

    if settings.doses is None:
        return [Fit(edit(job, job.strength or 0.0)) for job in jobs]

    def kl(numbers: Sequence[int], alphas: Sequence[float], share: float) -> list[float]:
        bank = stack(shared.model, [edit(jobs[k], alpha) for k, alpha in zip(numbers, alphas, strict=True)])
        return [drift["kl"] for drift in measure_drift(shared.model, shared.drift, bank, share)]

    doses = [job.strength or 0.0 for job in jobs]
    rough = match_doses(partial(kl, share=SEARCHED), doses, [1.0] * len(jobs))
    found = match_doses(partial(kl, share=1.0), doses, [alpha or 1.0 for alpha in rough])
    return [
        Fit(None, message=f"no alpha was found with a KL of {job.strength:g} nats per token")
        if alpha is None
        else Fit(edit(job, alpha), facts={"alpha": alpha})
        for job, alpha in zip(jobs, found, strict=True)
    ]


def match_doses(
    kl: Callable[[Sequence[int], Sequence[float]], Sequence[float]], doses: Sequence[float], start: Sequence[float]
) -> list[float | None]:
    """For each dose the alpha > 0 whose KL is within 3 % of it; None if it is not found in `MOST_TRIES` tries.

    ``kl(numbers, alphas)`` measures the edits with these numbers at these alphas, all in one bank. Each search begins
    at its `start`. KL grows as alpha^2 at first, which gives the next alpha until two enclose the dose; then log alpha
    is interpolated between them, or the interval is halved if that is slow.
    """
    found: list[float | None] = [None] * len(doses)
    points: list[list[tuple[float, float]]] = [[] for _ in doses]  # (log alpha, log KL - log dose) of each try
    tries = [math.log(alpha) for alpha in start]
    for _ in range(MOST_TRIES):
        left = [k for k, alpha in enumerate(found) if alpha is None]
        if not left:
            break
        for k, value in zip(left, kl(left, [math.exp(tries[k]) for k in left]), strict=True):
            off = math.log(value / doses[k]) if 0 < value < math.inf else -math.inf if value == 0 else math.inf
            if abs(off) <= math.log(1 + TOLERANCE):
                found[k] = math.exp(tries[k])
            points[k].append((tries[k], off))
            tries[k] = _next_try(points[k])
    return found


def _next_try(points: Sequence[tuple[float, float]]) -> float:
    """The log alpha to try next, where the second number, which grows with it, is to be 0."""
    below = max((point for point in points if point[1] < 0), default=None)
    above = min((point for point in points if point[1] >= 0), default=None)
    if below is None or above is None:
        x, off = points[-1]
        return x - min(max(off / 2, -2.0), 2.0)
    share = 0.5
    if len(points) < MOST_TRIES // 2 and math.isfinite(above[1] - below[1]):
        share = min(max(below[1] / (below[1] - above[1]), 0.1), 0.9)
    return below[0] + share * (above[0] - below[0])
