"""The specification table: the claim's result under every combination of choices that the records of a run allow.

An audit chooses a score, a way to count judgements, a strength, a null, a seed. Other choices would have been as
reasonable. The table repeats the comparison of claim and controls for each of them, from trials that were run anyway.
It shows whether the result depends on a choice. It is not a test: its rows share questions, edits and controls, and its
p-values are not corrected for their number.

Source: Simonsohn, Simmons and Nelson 2020, "Specification curve analysis".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

from locaudit.records import NO_METHOD, Place, TrialRecord
from locaudit.registry import SCORES
from locaudit.stats.measured import Design
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.scores import (
    GREEDY,
    MAX_MISSING,
    RELATED,
    SIGNS,
    Supports,
    components,
    has_score,
    is_judged,
    judged_scores,
    mean_score,
    missing_share,
    reaches,
    score_values,
    tolerance,
)
from locaudit.stats.selection import BASE, CLAIM, choose, fewest_samples, group_trials
from locaudit.stats.sequential import Null, look

Read = Callable[[int | None], Sequence[TrialRecord]]
"""``read(most)``: the trials, with judged scores that count at most that many sampled answers (None: all)."""
CHOSEN: Literal["chosen"] = "chosen"
"""The strength that validation questions choose at each place."""
Strength = float | Literal["chosen"]
_ONE = {
    "score": "one score",
    "judgement": "one way to count judgements",
    "answers": "only {} answers",
    "strength": "one strength",
    "null": "one null",
    "seed": "one training seed",
}
"""What to say of a choice that does not vary."""


@dataclass(frozen=True)
class Combination:
    """The claim against the controls under one combination of choices. Scores are in the score's units."""

    method: str
    score: str
    judgement: str
    """How judgements are counted: ``probability`` or ``yes or no``; empty for a score without a judge."""
    answers: str
    """Which answers are judged: ``greedy`` or ``sampled``; empty for a score without a judge."""
    samples: int | None
    """Number of sampled answers to a question that are counted at every place; None if none are."""
    strength: Strength
    """The same strength at claim and controls, or `CHOSEN`."""
    null: str
    seed: int
    """The training seed."""
    base: float
    """Score of the unedited model."""
    claim: float
    """Score of the edit at the claim; NaN if it diverged or none of its answers is judged."""
    effect: float
    """claim - base."""
    lead: float
    """claim - mean of the controls that have a score."""
    n_at_least: int
    """Number of controls that do at least as well as the claim, diverged ones included."""
    n_controls: int
    """Number of controls tried."""
    p_value: float
    """p of the claim against these controls, by the run's stopping rule (`locaudit.stats.sequential`); 1 without a
    score of the claim. With ``fixed`` it is `monte_carlo_p`."""
    better: bool | None
    """Whether the claim is better than these controls at the level.

    None if the data allow no answer: the test is open (planned controls are missing, or too few for p to reach the
    level), the claim has no score, or more than `MAX_MISSING` of a place's judgements are missing."""


@dataclass(frozen=True)
class Specification:
    """All combinations that one or several runs allow, and how often the claim is better."""

    rows: tuple[Combination, ...]

    def __add__(self, other: Specification) -> Specification:
        return Specification((*self.rows, *other.rows))

    @cached_property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """(method, null), in the order of the rows."""
        return tuple(dict.fromkeys((row.method, row.null) for row in self.rows))

    @cached_property
    def counts(self) -> Mapping[str, Mapping[tuple[str, str], tuple[int, int]]]:
        """Score -> (method, null) -> (combinations in which the claim is better, those that allow an answer)."""
        found: dict[str, dict[tuple[str, str], tuple[int, int]]] = {}
        for row in self.rows:
            of_score = found.setdefault(row.score, dict.fromkeys(self.columns, (0, 0)))
            n_better, n = of_score[row.method, row.null]
            of_score[row.method, row.null] = n_better + (row.better is True), n + (row.better is not None)
        return found

    @property
    def sentence(self) -> str:
        """In how many combinations the claim is better, and which choices do not vary."""
        told = [row.better for row in self.rows if row.better is not None]
        if not told:
            return "No combination allows an answer at this level."
        return f"The claim is better than its controls in {sum(told)} of {len(told)} combinations. {self.not_varied}"

    @property
    def not_varied(self) -> str:
        """The choices of which the records have only one, in a sentence."""
        is_judged = any(row.judgement for row in self.rows)
        found = []
        for name, phrase in _ONE.items():
            values = {value for row in self.rows if (value := getattr(row, name)) != ""}
            if len(values) == 1:
                found.append(phrase.format(*values))
        found.append("one judge per aspect" if is_judged else "no judge")
        return f"Not varied: {', '.join(found)}."


def specify(
    read: Read, methods: Mapping[str, MethodFacts], design: Design, *, score: str, level: float
) -> Specification:
    """Compare claim and controls under every combination of choices in the trials of a run. Nothing is run for it.

    Scores are all that the unedited model has, but the `neighborhood_score`, which is no measure of the behaviour;
    `score` is the verdict's. A single strength has a row if the claim and
    all controls of the null have a trial with it, because a strength by which grids widened at some places only would
    compare a selection of places. A method with one strength has no such row: its only strength is `CHOSEN`.

    Each comparison counts as many sampled answers as each of its trials has; only the trials that a score chooses have
    all of them. `methods` are those of the run, and `design` says how controls were planned. A method without a trial
    at the claim is left out. Without scores of the unedited model, there are no rows.
    """
    every = read(None)
    base = next((record for record in every if record.spec.place == BASE and record.status == "ok"), None)
    if base is None:
        return Specification(())
    questions, n_strengths = base.questions["test"], {name: facts.n_strengths for name, facts in methods.items()}
    fewest = min((len(record.samples.get("test", ())) for record in every if record.answers), default=0)
    plain = (x for x in SCORES if not is_judged(x) and x != RELATED["neighborhood"])
    names = dict.fromkeys([*judged_scores(questions), *plain, score])
    rows: list[Combination] = []
    for name in [x for x in names if has_score(questions, x)]:
        tie, (judgement, answers) = tolerance(name, design.dtype), _kinds(name, questions)
        n_samples = (None, None)
        if answers == "sampled":
            n_samples = fewest_samples(every, name, tie, n_strengths), fewest
        for by, samples in zip((_chosen, _alike), n_samples, strict=True):
            groups = group_trials(read(samples))
            for method, facts in methods.items():
                for strength, arms in by(groups.get(method, {}), name, tie).items():
                    unedited = groups[NO_METHOD][BASE][0]
                    found = _compare(unedited, arms, name, tie, facts.supports, design, level)
                    about = (method, name, judgement, answers, samples, strength)
                    rows += [Combination(*about, null, base.spec.seed, *values) for null, values in found.items()]
    return Specification(tuple(rows))


Trials = Mapping[Place, Sequence[TrialRecord]]
Arms = dict[Place, TrialRecord | None]


def _chosen(trials: Trials, score: str, tie: float) -> dict[Strength, Arms]:
    """`CHOSEN` -> the trial that validation questions choose at each place; empty without a trial at the claim."""
    return {CHOSEN: {place: choose(tried, score, tie) for place, tried in trials.items()}} if CLAIM in trials else {}


def _alike(trials: Trials, score: str, tie: float) -> dict[Strength, Arms]:
    """Strength -> the trial with this strength at claim and controls; empty if the claim has fewer than two strengths.

    Nulls are left out in which some control has no trial with the strength.
    """
    found: dict[Strength, Arms] = {}
    at = {place: {record.spec.hyperparameter: record for record in tried} for place, tried in trials.items()}
    strengths = sorted(x for x in at.get(CLAIM, {}) if x is not None)
    for strength in strengths if len(strengths) > 1 else ():
        lacking = {place.null for place, tried in at.items() if place.arm == "control" and strength not in tried}
        found[strength] = {
            place: tried[strength] for place, tried in at.items() if strength in tried and place.null not in lacking
        }
    return found


def _compare(
    unedited: TrialRecord, arms: Arms, score: str, tie: float, supports: Supports, design: Design, level: float
) -> dict[str, tuple[float, float, float, float, int, int, float, bool | None]]:
    """Null -> the last fields of a `Combination`, from `base` on."""
    before = score_values(unedited.questions["test"], score)
    values = {
        place: score_values(record.questions["test"], score)
        for place, record in arms.items()
        if record is not None and record.status == "ok"
    }
    means = {place: float(mean_score(values[place])) if place in values else math.nan for place in arms}
    base, claim, sign, found = float(mean_score(before)), means[CLAIM], SIGNS[supports], {}
    for null in dict.fromkeys(place.null for place in arms if place.arm == "control"):
        places = [place for place in arms if place.null == null and place.arm == "control"]
        controls = [means[place] for place in places]
        reached = reaches([sign * x for x in controls], sign * claim, tie).tolist()
        plan = design.nulls.get(null, Null(len(controls)))
        seen = look(reached, rule=design.rule, n_planned=plan.n_planned, level=level, population=plan.population)
        judged = [before, *(values[place] for place in (CLAIM, *places) if place in values)]
        missing = max(map(missing_share, judged))
        can_tell = not math.isnan(claim) and missing <= MAX_MISSING and seen.state != "open"
        scored = [x for x in controls if not math.isnan(x)]
        lead = claim - fmean(scored) if scored else math.nan
        p_value = 1.0 if math.isnan(claim) else seen.p_value
        better = seen.state == "specific" if can_tell else None
        found[null] = (base, claim, claim - base, lead, sum(reached), len(reached), p_value, better)
    return found


def _kinds(score: str, questions: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    """How judgements are counted, and which answers are judged; empty strings for a score without a judge."""
    if not is_judged(score):
        return "", ""
    names = [name.removesuffix(GREEDY) for name in components(score, questions)]
    is_sampled = not score.endswith(GREEDY) and has_score(questions, f"{score}{GREEDY}")
    judgement = "probability" if all(name.endswith("_probability") for name in names) else "yes or no"
    return judgement, "sampled" if is_sampled else "greedy"
