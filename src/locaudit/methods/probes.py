"""Linear probes: one logistic regression per unit, all fitted together by Newton's method. Units are ranked by them.

For each unit, with activations x_i, labels y_i in {0, 1} and inverse regularisation C,

    min over w, v:  C sum_i [log(1 + exp(z_i)) - y_i z_i] + |w|^2 / 2,   z_i = <w, x_i> + v

This is scikit-learn's ``LogisticRegression(C=C)``: activations are not scaled, and the intercept v is not penalised.
Units with the best held-out accuracy are a candidate for the claim.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locaudit.claims.ranking import Ranking
from locaudit.errors import DataError, LocationError
from locaudit.location import Location, Unit, spell_unit
from locaudit.measure.activations import Activations, check_finite

MAX_STEPS = 100
"""Largest number of Newton steps. A few steps are usually enough."""
TOLERANCE = 1e-8
"""Newton's method stops when the largest entry of the gradient is at most this number times C n."""
CHUNK_BYTES = 256 * 2**20
"""Units are fitted in chunks whose float64 features take at most this much memory."""


@dataclass(frozen=True, eq=False)
class Probes:
    """The fitted probes of all units."""

    weight: Float[Tensor, "layers units width"]
    intercept: Float[Tensor, "layers units"]
    val_accuracy: Float[Tensor, "layers units"]
    """Accuracy on the held-out part of the training questions."""
    majority: float
    """Share of the larger class among the held-out examples, which is the accuracy of always guessing this class."""
    n_train: int
    """Number of examples that probes were fitted on."""
    n_val: int
    """Number of held-out examples by which units were ranked."""
    kind: str = "head"
    """Kind of the units."""

    def __repr__(self) -> str:
        best, (layers, units) = self.ranking()[0], self.val_accuracy.shape
        return (
            f"Probes({layers} x {units} of kind {self.kind}; best {spell_unit(best)} with validation accuracy "
            f"{self.val_accuracy.max().item():.3f}, majority {self.majority:.3f})"
        )

    def ranking(self) -> list[Unit]:
        """Units from best to worst held-out accuracy; ties are ordered by layer, then unit."""
        return list(Ranking.of(self.kind, "probe", "", self.val_accuracy.tolist()).scores)

    def top(self, k: int) -> Location:
        """The k units with the best held-out accuracy, as a candidate location.

        Raises `LocationError` if k is not between 1 and the number of units.
        """
        ranking = self.ranking()
        if not 1 <= k <= len(ranking):
            raise LocationError(
                got=f"the top {k} units of {len(ranking)} ({self.kind})",
                expected=f"a number from 1 to {len(ranking)}",
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
    """Fit every unit's probe on some of the questions and measure its accuracy on the others.

    A share `val_fraction` of the questions, drawn from `seed`, is held out with all their answers. Raises `DataError`
    if no question is held out or none is left, or if the examples to fit on have only one class. Raises `ModelError`
    for activations that are NaN or infinite. Source: the paper, "Localization and Intervention Using Activation
    Statistics"; Li et al. 2023 (ITI), section 3.1.
    """
    check_finite(activations)
    n_questions = int(activations.question.max()) + 1
    order = list(range(n_questions))
    random.Random(seed).shuffle(order)
    n_val = round(val_fraction * n_questions)
    if not 0 < n_val < n_questions:
        raise DataError(
            got=f"{n_questions} training questions, of which {n_val} are held out to rank probes",
            expected="at least one question to fit on and one held out",
            remedy="use more questions, or change probe.val_fraction",
        )
    is_val = torch.isin(activations.question, torch.tensor(order[:n_val]))
    # x: (n, layers, units, width) -> (m, n, width), with m = layers x units; y: (n,)
    x, y = activations.values.flatten(1, 2).transpose(0, 1), activations.is_true
    weight, intercept = fit_logistic(x[:, ~is_val], y[~is_val], inverse_l2=inverse_l2)
    scores = torch.einsum("mnd,md->mn", x[:, is_val].double(), weight) + intercept.unsqueeze(1)  # (m, n_val)
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
    """Fit `m` L2-regularised logistic regressions with the same labels. Returns weights (m, d) and intercepts (m,).

    Both are float64. All problems take Newton steps together. If a step would raise a problem's objective, it is halved
    for this problem until it does not. The objective is strictly convex in w, so that the solution is unique. Raises
    `DataError` if only one class is present.
    """
    if y.all() or not y.any():
        raise DataError(got="examples of one class only", expected="both classes", remedy="use more questions")
    m, n, d = x.shape
    chunk = max(1, CHUNK_BYTES // (8 * n * (d + 1)))
    parts = [_newton(part.double(), y.double(), inverse_l2) for part in x.split(chunk)]
    theta = torch.cat(parts)
    return theta[:, :d], theta[:, d]


def _newton(x: Float[Tensor, "m n d"], y: Float[Tensor, " n"], c: float) -> Float[Tensor, "m d1"]:
    """Solve m problems at once. Each row of the result is (w, v), and d1 = d + 1."""
    m, n, d = x.shape
    x = torch.cat([x, x.new_ones(m, n, 1)], dim=2)  # (m, n, d + 1): the last feature, 1, belongs to the intercept
    ridge = torch.ones(d + 1, dtype=x.dtype)
    ridge[d] = 0.0  # the intercept is not penalised
    theta = x.new_zeros(m, d + 1)

    def objective(t: Tensor) -> Tensor:  # (m, d + 1) -> (m,)
        z = torch.einsum("mnd,md->mn", x, t)
        loss = torch.nn.functional.softplus(z) - y * z
        return c * loss.sum(dim=1) + (ridge * t * t).sum(dim=1) / 2

    value = objective(theta)
    for _ in range(MAX_STEPS):
        p = torch.sigmoid(torch.einsum("mnd,md->mn", x, theta))  # (m, n)
        gradient = c * torch.einsum("mnd,mn->md", x, p - y) + ridge * theta  # (m, d + 1)
        if gradient.abs().max() <= TOLERANCE * c * n:
            break
        # Hessian C X^T diag(p (1 - p)) X + diag(ridge): (m, d + 1, d + 1). The 1e-12 keeps it invertible.
        curvature = c * (x * (p * (1 - p)).unsqueeze(2)).transpose(1, 2) @ x + torch.diag(ridge + 1e-12)
        step = torch.linalg.solve(curvature, gradient)  # (m, d + 1)
        size = x.new_ones(m, 1)  # step size of each problem, halved below if its objective would rise
        proposed, new = theta, value
        for _ in range(30):
            proposed = theta - size * step
            new = objective(proposed)
            worse = new > value + 1e-12 * value.abs()
            if not worse.any():
                break
            size = torch.where(worse.unsqueeze(1), size / 2, size)
        better = (new < value).unsqueeze(1)  # a problem that no longer improves keeps its solution
        theta = torch.where(better, proposed, theta)
        if not better.any():
            break
        value = torch.minimum(new, value)
    return theta
