"""How long edits are trained with ``epochs: auto``: until training twice as long gains little.

An edit is trained for 2, 4, 8 and 16 epochs, each time from its start and with a cosine schedule of its own. The
objective L of each length is measured after training, on the training questions. The length taken is the first one, E,
with

    L(E) - L(2 E) < 0.02 |L(E)|

and 16 if there is none. This is done for one edit at the claim and one of the whole model. The larger length of the two
is then used for all edits, so that every arm gets the same number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from locaudit.edits import stack
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.methods.base import Fit
from locaudit.methods.objectives import log_ratios
from locaudit.methods.settings import HORIZONS, Reduction, TrainingSettings
from locaudit.methods.training import TrainingData
from locaudit.models import Model
from locaudit.registry import OBJECTIVES

LEAST_GAIN = 0.02
"""Share of the objective that twice as many epochs have to gain."""
Objectives = Sequence[float | None]
"""The objective after training for each of the first `HORIZONS`; None if training diverged."""


def horizon(objectives: Objectives) -> int | None:
    """The training length in epochs that these objectives settle; None if the next horizon has to be tried."""
    for n in range(2, len(objectives) + 1):
        if is_plateau(objectives[:n]):
            return HORIZONS[n - 2]
    return HORIZONS[-1] if len(objectives) == len(HORIZONS) else None


def is_plateau(objectives: Objectives) -> bool:
    """Whether the last horizon gained little over the one before; one that diverged gained nothing."""
    short, long = (math.inf if x is None else x for x in objectives[-2:])
    return math.isfinite(short) and (short - long < LEAST_GAIN * abs(short) or short == long)


def mean_loss(
    data: TrainingData, sums: Sequence[Tensor], objective: str, strength: float, reduction: Reduction = "sum"
) -> float:
    """The loss averaged over each question's pairs, then over questions.

    `sums` has for each question the edited model's answer log-probabilities (answers,), in nats.
    """
    losses = []
    for tree, n_true, after, before in zip(data.forest.trees, data.n_true, sums, data.reference, strict=True):
        ratio = log_ratios(after, before, after.new_tensor([len(branch) for branch in tree.branches]), reduction)
        margins = (ratio[:n_true, None] - ratio[n_true:]).flatten()  # (pairs,)
        losses.append(OBJECTIVES[objective].loss(margins, strength).mean().item())
    return fmean(losses)


def measure_objective(
    model: Model,
    data: TrainingData,
    found: Fit,
    strength: float,
    settings: TrainingSettings,
    residuals: Residuals | None = None,
    row_tokens: int | None = None,
) -> float | None:
    """The `mean_loss` of a fit on its training questions; None if there is no edit or the loss is not finite."""
    if found.edit is None:
        return None
    data = data.first(settings.max_questions)
    bank = stack(model, [found.edit])
    sums = answer_log_probs(model, data.forest, bank, residuals=residuals, row_tokens=row_tokens)
    loss = mean_loss(data, [x[0] for x in sums], settings.objective, strength, settings.reduction)
    return loss if math.isfinite(loss) else None
