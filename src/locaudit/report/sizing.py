"""Read from a run, finished or not, what it tells about audits of other sizes: noise, places and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.errors import ConfigError, RunFolderError
from locaudit.records import DIRECTIONS, NO_METHOD, Place, TrialRecord
from locaudit.stats.design import LEAST_CONTROLS, Components, Cost, Size, find_components
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.scores import GREEDY, SIGNS, is_judged, mean_score, score_values, tolerance
from locaudit.stats.selection import BASE, CLAIM, choose, group_trials
from locaudit.stats.sequential import Null
from locaudit.store.repeats import is_repeats, read_plan, repeat_folder
from locaudit.store.run import Run, judged, load_run

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Sizing:
    """What a run tells about audits of other sizes, for one method and score."""

    method: str
    title: str
    score: str
    nulls: Mapping[str, Components]
    """The nulls whose tests count -> variance components of the method."""
    size: Size
    """The size that the run was planned with."""
    is_sampled: bool
    """Whether the score is that of sampled answers."""
    knows_samples: bool
    """Whether the run has several samples of an answer, so that the gain from more of them is known."""
    level: float
    once: Cost
    """Claim, whole model, rest and unedited model, of all methods."""
    controls: tuple[tuple[Cost, tuple[Null, ...]], ...]
    """For each method, one control and the nulls that it has controls of."""
    claim_gain: float
    """Gain of the claim's edit over the unedited model, of which the margin of its lead is a share."""
    spent: float
    """Seconds that the run has taken; of a finished one, those of a whole audit of its size."""

    @property
    def parts(self) -> tuple[Components, ...]:
        """The components for each null."""
        return tuple(self.nulls.values())

    def seconds(self, size: Size) -> float:
        """Seconds of a whole audit of this size, without loading the model and preparing."""
        total = self.once.seconds(size)
        for cost, nulls in self.controls:
            n = sum(size.controls if x.population is None else min(size.controls, x.population) for x in nulls)
            total += n * cost.seconds(size)
        return size.seeds * total

    def more(self, size: Size) -> float:
        """Seconds that are left of such an audit if it grows from this run."""
        return max(0.0, self.seconds(size) - self.spent)


def read_sizing(folder: str | Path, method: str | None = None, null: str | None = None) -> tuple[Run, Sizing]:
    """The run in a folder, or the first of its repeats, and its sizing.

    Raises `ConfigError` for an unknown method or null, and `RunFolderError` if the run cannot say.
    """
    folders = [repeat_folder(folder, i) for i in range(max(read_plan(folder)))] if is_repeats(folder) else [folder]
    runs = [load_run(one) for one in folders]
    found = find_sizing(runs, method, null)
    if found is None:
        raise RunFolderError(
            got=f"{folder}, with too little to design an audit from",
            expected="scores of the unedited model, the claim and, for each null, "
            f"{LEAST_CONTROLS} controls that are not all alike; in repeats, the same test questions",
            remedy="run `locaudit design CONFIG.yaml`, which runs a pilot, or let the audit run on",
        )
    return runs[0], found


def find_sizing(runs: Run | Sequence[Run], method: str | None = None, null: str | None = None) -> Sizing | None:
    """The sizing of a run, or of its repeats with other training seeds and the same test questions.

    `method` None stands for the first trained method, or the first; `null` None for all nulls that can test. Raises
    `ConfigError` for one that the run does not have. None if the run cannot say: too few controls, or no scores.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    run, level = runs[0], runs[0].config.level
    method = method or find_method(run.manifest.methods)
    facts = _choose("method", method, run.manifest.methods)
    nulls = {name: x for name, x in run.manifest.nulls.items() if (name == DIRECTIONS) == (facts.null == DIRECTIONS)}
    if null is not None:
        nulls = {null: _choose("null", null, nulls)}
    able = {name: x for name, x in nulls.items() if x.can_test(level)}
    arms = [_values(one, method, facts) for one in runs]
    same = {tuple(sorted(q.id for q in one.questions["test"])) for one in runs}
    if len(same) > 1 or not all(BASE in x and CLAIM in x for x in arms):
        return None
    n_samples = min(len(x) for arm in arms for x in arm.values())
    shared = [place for place in arms[0] if all(place in arm for arm in arms)]
    table = {place: np.stack([arm[place][:n_samples] for arm in arms]) for place in shared}
    found: dict[str, Components] = {}
    for name, plan in (able or nulls).items():
        controls = [table[place] for place in sorted(shared) if (place.arm, place.null) == ("control", name)]
        parts = find_components(table[CLAIM], controls, table[BASE], plan.population) if controls else None
        if parts is None:
            return None
        found[name] = parts
    sampled = _counts_samples(run)
    planned = run.manifest.samples if sampled else 1
    size = Size(len(run.questions["test"]), planned, run.config.controls, len(runs))
    once, costs = _read_costs(run)
    spent = sum(sum(one.parts.get(fit, {"": x}).values()) for one in runs for fit, x in one.seconds.items())
    claim, base = (float(mean_score(table[x].mean(axis=(0, 1)))) for x in (CLAIM, BASE))
    known = method, facts.title, run.score, found, size, sampled, n_samples > 1, level, once, costs
    sizing = Sizing(*known, claim_gain=claim - base, spent=spent)
    return replace(sizing, spent=sizing.seconds(size)) if all(one.is_finished for one in runs) else sizing


def find_method(methods: Mapping[str, MethodFacts]) -> str:
    """The method that audits are designed for: the first trained one, or the first."""
    return next((name for name, facts in methods.items() if facts.trained), next(iter(methods)))


def _choose(what: str, name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise ConfigError(
            got=f"--{what} {name}", expected=f"one of {', '.join(known)}", remedy=f"choose one of the {what}s"
        )
    return known[name]


def _counts_samples(run: Run) -> bool:
    return bool(run.manifest.samples) and is_judged(run.score) and not run.score.endswith(GREEDY)


def _values(run: Run, method: str, facts: MethodFacts) -> dict[Place, Values]:
    """Values of the trial chosen at each place, (samples, components, questions), with questions ordered by id.

    Places without a score are left out. As in a verdict, all values have their sign flipped if lower scores support the
    claim.
    """
    tie, raw = tolerance(run.score, run.manifest.dtype), {(r.spec.trial_id, r.spec.place): r for r in run.trials}
    places = {**group_trials(run.records).get(method, {}), BASE: [r for r in run.records if r.spec.arm == "base"]}
    chosen = {place: choose(trials, run.score, tie) for place, trials in places.items()}
    found = {place: record for place, record in chosen.items() if record is not None}
    plain = {place: [record] for place, record in found.items()}
    if _counts_samples(run):
        alone = {place: raw[record.spec.trial_id, record.spec.place] for place, record in found.items()}
        plain = {place: _each_sample(run, record) or [found[place]] for place, record in alone.items()}
    # a component of -1 flips the sign of a product
    ids = [question.id for question in run.questions["test"]]
    turn, order = np.full((int(facts.supports == "lower"), len(ids)), SIGNS["lower"]), np.argsort(ids)
    return {
        place: np.stack(
            [np.concatenate([score_values(record.questions["test"], run.score), turn])[:, order] for record in records]
        )
        for place, records in plain.items()
    }


def _each_sample(run: Run, record: TrialRecord) -> list[TrialRecord]:
    """The record with each of its samples alone."""
    samples = [replace(record, samples={**record.samples, "test": (x,)}) for x in record.samples.get("test", ())]
    return judged(samples, run.judgements, run.questions)


def _read_costs(run: Run) -> tuple[Cost, tuple[tuple[Cost, tuple[Null, ...]], ...]]:
    """What places cost. What was not tried is taken to cost as much as the claim."""
    once, controls, config = Cost(), [], run.config
    groups = group_trials(run.trials)
    for trials in groups.get(NO_METHOD, {}).values():
        once = once + _cost(run, trials)
    for method, facts in run.manifest.methods.items():
        costs = {place: _cost(run, trials) for place, trials in groups.get(method, {}).items()}
        claim = costs.get(CLAIM, Cost())
        has_rest = config.whole_model and config.rest and facts.trained
        n_arms = 1 + config.whole_model + has_rest * (1 + run.manifest.rest_controls) + run.manifest.placebos
        known = [cost for place, cost in costs.items() if place.arm != "control"]
        once = sum(known, once) + claim * max(0, n_arms - len(known))
        tried = [cost for place, cost in costs.items() if place.arm == "control"]
        one = sum(tried, Cost()) * (1 / len(tried)) if tried else claim
        nulls = [x for name, x in run.manifest.nulls.items() if (name == DIRECTIONS) == (facts.null == DIRECTIONS)]
        controls.append((one, tuple(nulls)))
    return once, tuple(controls)


def _cost(run: Run, trials: Sequence[TrialRecord]) -> Cost:
    """The cost of a place from the seconds of its trials by part."""
    found = Cost()
    for record in trials:
        fit, n = record.spec.trial_id, {split: len(run.questions.get(split, ())) for split in record.questions}
        parts = run.parts.get(fit) or {"score": run.seconds[fit]}  # a run of an earlier version
        test = n.get("test", 0)
        if not test:
            found = found + Cost(sum(parts.values()))
            continue
        score, answer = parts.get("score", 0.0) / sum(n.values()), parts.get("answer", 0.0) / (test + n.get("val", 0))
        question, first = score + answer, min(run.manifest.samples, 1)
        n_more = len(record.samples.get("test", ())) - first
        sample = parts.get("sample", 0.0) / (test * n_more) if n_more > 0 else 0.0
        fixed = parts.get("edit", 0.0) + (sum(n.values()) - test) * score + n.get("val", 0) * answer
        found = found + Cost(fixed, question, sample)
    return found
