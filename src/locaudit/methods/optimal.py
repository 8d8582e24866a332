"""Optimal and constant edits: trained on true and false answers, and restricted to the location."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from locaudit.claims import Shape, find_kind
from locaudit.location import Location
from locaudit.methods.base import Fit, Job
from locaudit.methods.objectives import default_learning_rate
from locaudit.methods.parameters import TrainableEdit
from locaudit.methods.settings import ConstantSettings, OptimalSettings, TrainingSettings
from locaudit.methods.training import PART_TOKENS, Trainee, step_size, train
from locaudit.models.memory import of_device

OnStep = Callable[[int, int], None]


def fit(shared: Any, jobs: Sequence[Job], settings: OptimalSettings, on_step: OnStep | None = None) -> list[Fit]:
    """Train each job's edit h' = h + B A h, ``settings.bank_size`` edits at a time (None: all together)."""

    def start(job: Job) -> TrainableEdit:
        options = {"rank": settings.rank, "reader": settings.reader, "positions": settings.positions}
        return TrainableEdit(shared.model, job.location, seed=job.seed, **options)

    return _fit(shared, jobs, settings, start, on_step)


def fit_constant(
    shared: Any, jobs: Sequence[Job], settings: ConstantSettings, on_step: OnStep | None = None
) -> list[Fit]:
    """Train each job's constant edit h' = h + b, ``settings.bank_size`` edits at a time (None: all together)."""

    def start(job: Job) -> TrainableEdit:
        return TrainableEdit(shared.model, job.location, constant=True, positions=settings.positions, seed=job.seed)

    return _fit(shared, jobs, settings, start, on_step)


def _fit(
    shared: Any,
    jobs: Sequence[Job],
    settings: TrainingSettings,
    start: Callable[[Job], TrainableEdit],
    on_step: OnStep | None,
) -> list[Fit]:
    """Train one edit per job, in banks. Reads `shared`'s model, training data, cached residuals and row_tokens."""
    data = shared.training.first(settings.max_questions)
    trainees = [
        Trainee(
            partial(start, job),
            job.strength or 0.0,
            job.seed,
            learning_rate(shared.model.shape, job.location, settings, data.mean_pairs),
        )
        for job in jobs
    ]
    size = settings.bank_size or len(jobs)
    banks = [trainees[i : i + size] for i in range(0, len(jobs), size)]
    part = of_device(PART_TOKENS, shared.model.device)
    return [
        found
        for bank in banks
        for found in train(
            shared.model,
            data,
            bank,
            settings,
            residuals=shared.residuals["train"],
            step_tokens=min(part, shared.row_tokens or part),
            on_step=on_step,
        )
    ]


def learning_rate(shape: Shape, location: Location, settings: TrainingSettings, pairs: float) -> float:
    """The learning rate in the settings or, if None, the default for a location of this kind and size.

    `pairs` is the mean number of pairs of a training question.
    """
    kind, whole = find_kind(location), Location.whole(location.kind)
    size, n = kind.heads_worth(location, shape), kind.heads_worth(whole, shape)
    in_step = pairs * step_size(settings.batching, settings.batch_size)
    return settings.learning_rate or kind.pace(location) * default_learning_rate(settings.batching, size, n, in_step)
