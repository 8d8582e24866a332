"""Linear probes of every unit, fitted together by Newton's method, and the ranking that gives a candidate location.

For each unit, with C the inverse regularisation and y in {0, 1},

    min over w, v:  C sum_i [log(1 + exp(z_i)) - y_i z_i] + |w|^2 / 2,   z_i = <w, x_i> + v

which is scikit-learn's ``LogisticRegression(C=C)``: activations unscaled, the intercept v not penalised.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locaudit.errors import DataError, LocationError
from locaudit.location import Location, Unit, spell_unit
from locaudit.measure.activations import Activations
from locaudit.registry import KINDS

MAX_STEPS = 100
"""Newton steps; a handful are usual."""
TOLERANCE = 1e-8
"""Largest gradient entry, relative to C n."""
CHUNK_BYTES = 256 * 2**20
"""Memory for one chunk of units' float64 features."""


@dataclass(frozen=True, eq=False)
class Probes:
    """One probe a unit."""

    weight: Float[Tensor, "layers units width"]
    intercept: Float[Tensor, "layers units"]
    val_accuracy: Float[Tensor, "layers units"]
    """On held-out questions among those given."""
    majority: float
    """Share of the larger class among the held-out examples: what a constant guess reaches."""
    n_train: int
    """Examples fitted on."""
    n_val: int
    """Examples ranked on."""
    kind: str = "head"

    def __repr__(self) -> str:
        best, (layers, units) = self.ranking()[0], self.val_accuracy.shape
        return (
            f"Probes({layers} x {units} of kind {self.kind}; best {spell_unit(best)} with validation accuracy "
            f"{self.val_accuracy.max().item():.3f}, majority {self.majority:.3f})"
        )

    def ranking(self) -> list[Unit]:
        """Units by falling accuracy; ties by layer, then unit."""
        layers, units = self.val_accuracy.shape
        accuracy = self.val_accuracy.tolist()
        pairs = sorted(
            ((layer, unit) for layer in range(layers) for unit in range(units)),
            key=lambda pair: (-accuracy[pair[0]][pair[1]], pair),
        )
        # A kind of one unit a layer names it by the layer alone.
        whole_layers = units == 1 and KINDS[self.kind].whole_layers
        return [pair[:1] if whole_layers else pair for pair in pairs]

    def top(self, k: int) -> Location:
        """The k best probed units: the candidate location."""
        ranking = self.ranking()
        if not 1 <= k <= len(ranking):
            raise LocationError(
                got=f"top {k} of {len(ranking)} {self.kind}",
                expected=f"1 to {len(ranking)}",
                remedy="change probe.top_k",
            )
        return Location(tuple(ranking[:k]), self.kind)


def fit_probes(
    activations: Activations,
    *,
    inverse_l2: float = 1.0,
    val_fraction: float = 0.25,
    seed: int = 0,
    kind: str = "head",
) -> Probes:
    """Fit every unit's probe on part of the questions and rank units by accuracy on the others.

    The split is by question, drawn from `seed`. Source: the paper, "Localization and Intervention Using Activation
    Statistics"; Li et al. 2023 (ITI), section 3.1.
    """
    n_questions = int(activations.question.max()) + 1
    order = list(range(n_questions))
    random.Random(seed).shuffle(order)
    n_val = round(val_fraction * n_questions)
    if not 0 < n_val < n_questions:
        raise DataError(
            got=f"{n_questions} training questions, of which {n_val} to rank probes on",
            expected="at least one question on each side",
            remedy="give more questions, or change probe.val_fraction",
        )
    is_val = torch.isin(activations.question, torch.tensor(order[:n_val]))
    x, y = activations.values.flatten(1, 2).transpose(0, 1), activations.is_true
    weight, intercept = fit_logistic(x[:, ~is_val], y[~is_val], inverse_l2=inverse_l2)
    scores = torch.einsum("mnd,md->mn", x[:, is_val].double(), weight) + intercept.unsqueeze(1)
    accuracy = ((scores > 0) == y[is_val]).double().mean(dim=1)
    layers, units = activations.values.shape[1:3]
    share = y[is_val].double().mean().item()
    return Probes(
        weight.view(layers, units, -1),
        intercept.view(layers, units),
        accuracy.view(layers, units),
        max(share, 1 - share),
        int((~is_val).sum()),
        int(is_val.sum()),
        kind,
    )


def fit_logistic(
    x: Float[Tensor, "m n d"], y: Bool[Tensor, " n"], *, inverse_l2: float = 1.0
) -> tuple[Float[Tensor, "m d"], Float[Tensor, " m"]]:
    """L2 logistic regressions of one set of labels on `m` sets of features; float64 weights and intercepts.

    Damped Newton steps, all problems at once; a step that does not lower a problem's objective is halved. The objective
    is strictly convex in w, so the answer is unique. Raises `DataError` when only one class is present.
    """
    if y.all() or not y.any():
        raise DataError(got="examples of one class only", expected="both classes", remedy="give more questions")
    m, n, d = x.shape
    chunk = max(1, CHUNK_BYTES // (8 * n * (d + 1)))
    parts = [_newton(part.double(), y.double(), inverse_l2) for part in x.split(chunk)]
    theta = torch.cat(parts)
    return theta[:, :d], theta[:, d]


def _newton(x: Float[Tensor, "m n d"], y: Float[Tensor, " n"], c: float) -> Float[Tensor, "m d1"]:
    m, n, d = x.shape
    x = torch.cat([x, x.new_ones(m, n, 1)], dim=2)
    ridge = torch.ones(d + 1, dtype=x.dtype)
    ridge[d] = 0.0
    theta = x.new_zeros(m, d + 1)

    def objective(t: Tensor) -> Tensor:
        z = torch.einsum("mnd,md->mn", x, t)
        loss = torch.nn.functional.softplus(z) - y * z
        return c * loss.sum(dim=1) + (ridge * t * t).sum(dim=1) / 2

    value = objective(theta)
    for _ in range(MAX_STEPS):
        p = torch.sigmoid(torch.einsum("mnd,md->mn", x, theta))
        gradient = c * torch.einsum("mnd,mn->md", x, p - y) + ridge * theta
        if gradient.abs().max() <= TOLERANCE * c * n:
            break
        curvature = c * (x * (p * (1 - p)).unsqueeze(2)).transpose(1, 2) @ x + torch.diag(ridge + 1e-12)
        step = torch.linalg.solve(curvature, gradient)
        size = x.new_ones(m, 1)
        proposed, new = theta, value
        for _ in range(30):
            proposed = theta - size * step
            new = objective(proposed)
            worse = new > value + 1e-12 * value.abs()
            if not worse.any():
                break
            size = torch.where(worse.unsqueeze(1), size / 2, size)
        better = (new < value).unsqueeze(1)
        theta = torch.where(better, proposed, theta)
        if not better.any():
            break
        value = torch.minimum(new, value)
    return theta
