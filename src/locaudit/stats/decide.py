"""Turn the records of an audit into a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from locaudit.errors import RunFolderError
from locaudit.records import TrialRecord
from locaudit.stats.changes import count_changes
from locaudit.stats.grades import grade
from locaudit.stats.measured import Against, Design, Measured, measure
from locaudit.stats.optimisation import find_flags
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.scores import SIGNS, has_score, tolerance
from locaudit.stats.selection import BASE, CLAIM, WHOLE, group_trials
from locaudit.stats.sequential import State
from locaudit.stats.tests import max_t_p, t_test_p
from locaudit.stats.verdict import MethodVerdict, NullResult, Verdict, find_outcome
from locaudit.stats.words import headline, sentence


def decide(
    records: Iterable[TrialRecord],
    *,
    score: str,
    level: float = 0.05,
    design: Design | None = None,
    methods: Mapping[str, MethodFacts] | None = None,
) -> Verdict:
    """Compare claim, controls, whole model and unedited model on the test questions, for each method.

    The first rule that applies gives a method's outcome:

    1. `underpowered`: every edit at the claim diverged; or there are too few test questions for any effect to be
       significant (2^-questions > level); or more than `MAX_MISSING` of an arm's judgements are missing, since answers
       on which a judge fails are not a random sample.
    2. `no effect`: the claim's gain over the unedited model is not significant at `level` in a one-sided paired
       sign-flip test over questions.
    3. `effective, not specific`: a Monte-Carlo p against a null other than ``layers`` is above `level`.
    4. `underpowered`: planned controls of a null are missing, or 1 / (1 + N) > level: no p could be significant.
    5. `specific` if p is at most `level` against every null. If it is not against ``layers`` alone, `specific to its
       layers`, or `effective, not specific` without a null ``anywhere``.

    A null with too few places for p to reach the level (`Null.can_test`) is reported, but does not enter the outcome.
    If controls were stopped early, the stopping rule of `design` decides steps 3 to 5 (`locaudit.stats.sequential`).
    Each method also gets four grades (`locaudit.stats.grades`).

    `methods` gives each method's title and whether higher or lower scores support the claim; if lower ones do, all
    scores are compared with their sign flipped. A method missing from it keeps its name as title, and higher scores
    support the claim. The verdict lists the methods in the order of `methods`, then the others as they first appear.

    A method whose claim has no record yet is left out, so an unfinished audit can be read. Raises `RunFolderError`
    while the unedited model has no scores.

    Deviation from the paper: the paper uses a parametric p-value over random sets; the Monte-Carlo p used here makes no
    assumption about the null distribution. Definitions and assumptions: docs/statistics.md.
    """
    records, facts = list(records), dict(methods or {})
    base, trials = _unedited(records, score), group_trials(records)
    facts |= {name: MethodFacts(name) for name in trials if name not in facts}
    measured = [
        measure(name, facts[name], {BASE: [base], **trials[name]}, score, level, design or Design())
        for name in facts
        if CLAIM in trials.get(name, {})
    ]
    adjusted = _adjusted(measured)
    tie = tolerance(score, (design or Design()).dtype)
    flags = find_flags(records, facts, score, tie)
    found = {m.method: replace(_judge(m, score, adjusted), flags=flags[m.method]) for m in measured}
    return Verdict(
        headline=headline(found, facts),
        score=score,
        level=level,
        n_questions=len(next(iter(base.questions["test"].values()))),
        n_controls=max((null.n_planned for v in found.values() for null in v.nulls.values()), default=0),
        claim=next((str(r.spec.location) for r in records if r.spec.arm == "claim"), ""),
        methods=found,
        tolerance=tie,
    )


def _unedited(records: Sequence[TrialRecord], score: str) -> TrialRecord:
    """The record of the unedited model; `RunFolderError` if there is none or it lacks the score."""
    base = next((r for r in records if r.spec.arm == "base" and r.status == "ok"), None)
    if base is None:
        raise RunFolderError(
            got="a run in which the unedited model has no scores yet",
            expected="at least the record of the unedited model",
            remedy="run the audit first; if it was stopped, run the same command again",
        )
    if not has_score(base.questions["test"], score):
        raise RunFolderError(
            got=f"score = {score}, which the records lack (they have {', '.join(sorted(base.questions['test']))})",
            expected="a score that was measured",
            remedy="choose another score, or run the same command with the judges that this score needs",
        )
    return base


def _judge(m: Measured, score: str, adjusted: Mapping[tuple[str, str], float]) -> MethodVerdict:
    sign = SIGNS[m.facts.supports]  # -1 undoes the sign flip of `measure`: scores are reported as measured
    states: dict[str, State] = {name: null.look.state for name, null in m.nulls.items() if null.plan.can_test(m.level)}

    def told(interval: tuple[float, float]) -> tuple[float, float]:
        low, high = sorted(sign * x for x in interval)
        return low, high

    def against(name: str, null: Against) -> NullResult:
        lead = null.lead
        return NullResult(
            name=name,
            can_test=name in states,
            state=null.look.state,
            controls=tuple(sign * x for x in null.means),
            p_value=null.p_value,
            p_adjusted=adjusted[m.method, name],
            p_parametric=math.nan if m.unscored else t_test_p(m.means[CLAIM], null.means, m.tolerance),
            n_at_least=null.look.n_at_least,
            n_planned=null.plan.n_planned,
            population=null.plan.population,
            n_used=null.look.n,
            ended_early=null.look.state != "open" and null.look.n < null.plan.n_planned,
            gap=sign * lead.difference if lead else math.nan,
            gap_interval=told(lead.interval_95) if lead else (math.nan, math.nan),
        )

    verdict = MethodVerdict(
        method=m.method,
        title=m.facts.title,
        supports=m.facts.supports,
        outcome=find_outcome(not m.nothing_to_say, m.effect_p, m.level, states),
        base=sign * m.means[BASE],
        claim=sign * m.means[CLAIM],
        whole_model=sign * m.means[WHOLE] if WHOLE in m.means else None,
        nulls={name: against(name, null) for name, null in m.nulls.items()},
        effect=sign * m.gain.difference,
        effect_interval=told(m.gain.interval_95),
        effect_p=m.effect_p,
        grades=grade(m) if m.design.graded else (),
        n_missing=sum(m.missing),
        n_judged=len(m.missing) * m.n_questions,
        worst_missing=m.worst_missing,
        chosen=m.chosen,
        sentence="",
        changes={
            place.label: count_changes(values, m.arms[BASE], m.tolerance, sign)
            for place, values in m.arms.items()
            if place.arm != "base"
        },
    )
    return replace(verdict, sentence=sentence(verdict, m.facts, score, m.level, m.n_questions))


def _adjusted(measured: Sequence[Measured]) -> dict[tuple[str, str], float]:
    """(method, null) -> p adjusted for testing several methods at the same controls (max-T within a null)."""
    found: dict[tuple[str, str], float] = {}
    for name in dict.fromkeys(name for m in measured for name in m.nulls):
        tests = [(m, m.nulls[name]) for m in measured if name in m.nulls]
        p_values, n = [null.p_value for _, null in tests], min(null.look.n for _, null in tests)
        if len(tests) > 1 and n and not any(m.unscored for m, _ in tests):
            controls = np.asarray([null.means[:n] for _, null in tests]).T
            together = max_t_p([m.means[CLAIM] for m, _ in tests], controls, [m.tolerance for m, _ in tests])
            adjusted = list(map(max, p_values, together))
        else:  # Bonferroni: max-T needs a score at every claim
            adjusted = [min(1.0, len(tests) * p) for p in p_values]
        found |= {(m.method, name): p for (m, _), p in zip(tests, adjusted, strict=True)}
    return found
