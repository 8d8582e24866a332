"""One trial: (what all trials share, identity) -> (record, edit).

No clock, no global random state, and no files but those of `Shared.cache`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from locaudit.behaviours import Question
from locaudit.config import AuditConfig
from locaudit.edits import Edit, EditBank, stack
from locaudit.location import parse_location
from locaudit.measure.answers import answer_prompts
from locaudit.measure.drift import DriftText, measure_drift
from locaudit.measure.forward import Prefix, answer_log_probs, run_prefix
from locaudit.measure.multiple_choice import means, score_questions
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest
from locaudit.methods.iti import iti_edit
from locaudit.methods.training import Job, TrainingData, train
from locaudit.models import Model
from locaudit.records import TrialRecord, TrialSpec
from locaudit.store.cache import Cache


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The questions of one split as they are scored, with the unedited model's log-probabilities."""

    questions: tuple[Question, ...]
    forest: Forest
    reference: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Shared:
    """What all trials of an audit share. A trial depends on this and its own identity only."""

    model: Model
    config: AuditConfig
    training: TrainingData
    splits: Mapping[str, HeldOut]
    """``val`` and ``test``."""
    drift: DriftText
    theta: Tensor | None
    """sigma u of every unit (layers, units, width); None when ITI is not run."""
    cache: Cache
    """Answers generated before."""

    row_tokens: int | None = None
    """Padded tokens of one scoring forward (None: by device); less after a device ran out of memory."""

    fitted: dict[str, tuple[Edit | None, tuple[float, ...], str]] = field(default_factory=dict)
    """Trained edits of trials without a record yet, by id: scoring them may run out of memory and be tried again."""

    @cached_property
    def residuals(self) -> dict[str, Residuals]:
        """Residual streams of the unedited model on ``train``, ``val`` and ``test``, read when first needed."""
        forests = {"train": self.training.forest} | {name: held.forest for name, held in self.splits.items()}
        return {name: Residuals(self.model, forest) for name, forest in forests.items()}


def run_trials(
    shared: Shared, specs: Sequence[TrialSpec], on_step: Callable[[int, int], None] | None = None
) -> list[tuple[TrialRecord, Edit | None]]:
    """Fit the edits of trials of one method and score them together as one bank; None for an edit that diverged.

    Optimal edits are trained in banks of ``optimal.bank_size``.
    """
    if specs[0].method == "none":
        return [(_base_record(shared, spec), None) for spec in specs]
    fits = [_fit_iti(shared, spec) for spec in specs] if specs[0].method == "iti" else _fit_optimal(
        shared, specs, on_step
    )  # fmt: skip
    alive = [i for i, (edit, _, _) in enumerate(fits) if edit is not None]
    scored = iter(_score(shared, specs, [fits[i][0] for i in alive]) if alive else [])  # type: ignore[misc]
    out: list[tuple[TrialRecord, Edit | None]] = []
    for spec, (edit, losses, message) in zip(specs, fits, strict=True):
        training = {"loss": losses} if losses else {}
        scores = None if edit is None else next(scored)
        if scores is None:
            message = message or "scores under the edit are not finite"
            out.append((TrialRecord(spec, "diverged", message, training=training), None))
        else:
            record = TrialRecord(spec, "ok", "", **scores, training=training, edit=f"{spec.trial_id}.safetensors")
            out.append((record, edit))
    for spec in specs:
        shared.fitted.pop(spec.trial_id, None)
    return out


def scored_splits(config: AuditConfig, spec: TrialSpec) -> tuple[str, ...]:
    """Splits that a trial is scored on: validation only where there is a hyperparameter to choose."""
    grid = {"iti": config.iti.alphas, "optimal": config.optimal.strengths}.get(spec.method, ())
    return ("val", "test") if len(grid) > 1 or spec.arm == "base" else ("test",)


def _fit_iti(shared: Shared, spec: TrialSpec) -> tuple[Edit | None, tuple[float, ...], str]:
    assert shared.theta is not None and spec.hyperparameter is not None
    edit = iti_edit(
        shared.model,
        parse_location(spec.location),
        shared.theta,
        alpha=spec.hyperparameter,
        positions=shared.config.iti.positions,
    )
    return edit, (), ""


def _fit_optimal(
    shared: Shared, specs: Sequence[TrialSpec], on_step: Callable[[int, int], None] | None
) -> list[tuple[Edit | None, tuple[float, ...], str]]:
    settings = shared.config.optimal
    todo = [spec for spec in specs if spec.trial_id not in shared.fitted]
    size = settings.bank_size or 1
    for start in range(0, len(todo), size):
        bank = todo[start : start + size]
        fits = train(
            shared.model,
            shared.training,
            [
                Job(parse_location(spec.location), spec.hyperparameter or 0.0, spec.rng_seed, settings.learning_rate)
                for spec in bank
            ],
            objective=settings.objective,
            reduction=settings.reduction,
            reader=settings.reader,
            batching=settings.batching,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            max_grad_norm=settings.max_grad_norm,
            optimizer=settings.optimizer,
            residuals=shared.residuals["train"],
            step_tokens=shared.row_tokens,
            on_step=on_step,
        )
        for spec, fit in zip(bank, fits, strict=True):
            shared.fitted[spec.trial_id] = fit.edit, fit.losses, fit.message
    return [shared.fitted[spec.trial_id] for spec in specs]


def _score(shared: Shared, specs: Sequence[TrialSpec], edits: Sequence[Edit]) -> list[dict[str, Any] | None]:
    """A record's metrics, drift, questions and answers under each edit; None where a number is not finite."""
    bank = stack(shared.model, edits)
    names = scored_splits(shared.config, specs[0])
    prefixes = _prefixes(shared, names, bank)
    sums = {
        name: answer_log_probs(
            shared.model,
            shared.splits[name].forest,
            bank,
            prefix=prefixes[name],
            residuals=shared.residuals[name],
            row_tokens=shared.row_tokens,
        )
        for name in names
    }
    drift = measure_drift(shared.model, shared.drift, bank)
    finite = [
        all(torch.isfinite(x[k]).all() for rows in sums.values() for x in rows)
        and all(map(math.isfinite, drift[k].values()))
        for k in range(len(edits))
    ]
    alive = [k for k in range(len(edits)) if finite[k]]
    answers = (
        _answers(shared, names, [edits[k] for k in alive], prefixes if len(alive) == len(edits) else {})
        if alive
        else []
    )
    out: list[dict[str, Any] | None] = [None] * len(edits)
    for k, said in zip(alive, answers, strict=True):
        questions = {
            name: score_questions(
                shared.splits[name].questions, [x[k] for x in rows], list(shared.splits[name].reference)
            )
            for name, rows in sums.items()
        }
        out[k] = {
            "metrics": {name: means(scores) for name, scores in questions.items()},
            "drift": drift[k],
            "questions": questions,
            "answers": said,
        }
    return out


def _prefixes(shared: Shared, names: Sequence[str], bank: EditBank) -> dict[str, Prefix | None]:
    """Keys and values of the prefix of each split's prompts, run once where they are the same."""
    out: dict[tuple[int, ...], Prefix | None] = {}
    with torch.no_grad():
        for name in names:
            prefix = shared.splits[name].forest.prefix
            if prefix not in out:
                out[prefix] = run_prefix(shared.model, prefix, bank)
    return {name: out[shared.splits[name].forest.prefix] for name in names}


def _answers(
    shared: Shared, names: Sequence[str], edits: Sequence[Edit] | None, prefixes: Mapping[str, Prefix | None]
) -> list[dict[str, tuple[str, ...]]]:
    """Split -> answers, for each edit (for the unedited model alone when None)."""
    limit = shared.config.evaluation.max_new_tokens
    n_edits = 1 if edits is None else len(edits)
    if not limit:
        return [{} for _ in range(n_edits)]
    said = {
        name: answer_prompts(
            shared.model,
            shared.splits[name].forest,
            edits,
            max_new_tokens=limit,
            cache=shared.cache,
            cached_prefix=prefixes.get(name),
            batch_tokens=shared.row_tokens,
        )
        for name in names
    }
    return [{name: said[name][k] for name in names} for k in range(n_edits)]


def _base_record(shared: Shared, spec: TrialSpec) -> TrialRecord:
    """The unedited model's scores come from the reference log-probabilities themselves."""
    questions = {
        name: score_questions(held.questions, list(held.reference), list(held.reference))
        for name, held in shared.splits.items()
    }
    return TrialRecord(
        spec,
        "ok",
        "",
        {name: means(scores) for name, scores in questions.items()},
        measure_drift(shared.model, shared.drift, None)[0],
        questions,
        _answers(shared, tuple(shared.splits), None, {})[0],
    )
