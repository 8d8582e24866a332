"""Turn the records of an audit into a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from locaudit.errors import RunFolderError
from locaudit.records import TrialRecord
from locaudit.stats.changes import count_changes
from locaudit.stats.measured import Against, Design, Measured, measure
from locaudit.stats.optimisation import Flag, find_destroyed, find_flags
from locaudit.stats.phrases import MethodFacts, say
from locaudit.stats.questions import Answer, ask, outcome_of, turned
from locaudit.stats.scores import SIGNS, has_score, tolerance
from locaudit.stats.selection import BASE, CLAIM, WHOLE, find_unedited, group_trials
from locaudit.stats.tests import Contrast, contrast_methods, max_t_p, new_place_p
from locaudit.stats.verdict import MethodVerdict, NullResult, Verdict
from locaudit.stats.words import explain


def decide(
    records: Iterable[TrialRecord],
    *,
    score: str,
    level: float = 0.05,
    design: Design | None = None,
    methods: Mapping[str, MethodFacts] | None = None,
    questions: Sequence[str] = (),
) -> Verdict:
    """Compare claim, controls, whole model and unedited model on the test questions, for each method.

    Each method answers some questions (`locaudit.stats.questions`), and its outcome follows from the answers:

    1. `CANNOT TELL`: every edit at the claim diverged; there are too few test questions for any gain to be significant
       (2^-questions > level); more than `MAX_MISSING` of an arm's judgements are missing; a placebo edit gains; or the
       edit at the claim destroys the model (where higher scores support it).
    2. The claim's gain is not significant (`gain_p`): `NO GAIN SHOWN` if the whole model's is, by an edit that does not
       destroy the model, and the claim's is shown to be below the margin, a share of it. Else `CANNOT TELL`.
    3. The gain is significant, and p against a null is at most the level (Monte-Carlo test): better than its places.
       Not better, if it is shown that these do as well: more than a share `level` of them scores at least as high, or
       the claim leads their mean by less than the margin. Else the null is open.
    4. `NOT SPECIFIC` if it is not better than the places of a null other than ``layers``. `CANNOT TELL` if a null is
       open. `SPECIFIC TO ITS LAYERS` if it is not better than those in its layers only. `SPECIFIC` if it is better than
       the places of every null.

    A null with too few places for p to reach the level (`Null.can_test`) is reported, but does not enter the outcome.
    If controls were stopped early, the stopping rule of `design` decides step 3 (`locaudit.stats.sequential`).

    `methods` gives each method's title and whether higher or lower scores support the claim; if lower ones do, all
    scores are compared with their sign flipped. A method missing from it keeps its name as title, and higher scores
    support the claim. `questions` has the texts of the test questions, by which degenerate answers are found. The
    verdict lists the methods in the order of `methods`, then the others as they first appear.

    A method whose claim has no record yet is left out, so an unfinished audit can be read. Raises `RunFolderError`
    while the unedited model has no scores.

    Deviation from the paper: the paper uses a parametric p-value over random sets; the Monte-Carlo p used here makes no
    assumption about the null distribution. Definitions and assumptions: docs/statistics.md.
    """
    records, facts, design = list(records), dict(methods or {}), design or Design()
    base, trials = _unedited(records, score), group_trials(records)
    facts |= {name: MethodFacts(name) for name in trials if name not in facts}
    tie = tolerance(score, design.dtype)
    flags = find_flags(records, facts, score, tie, design.margin)
    destroyed = find_destroyed(records, questions, score, tie)
    measured = [
        measure(
            name,
            facts[name],
            {BASE: [base], **trials[name]},
            score,
            level,
            design,
            {place for flag in destroyed[name] for place in flag.places},
        )
        for name in facts
        if CLAIM in trials.get(name, {})
    ]
    adjusted = _adjusted(measured)
    found = {m.method: _judge(m, adjusted, (*flags[m.method], *destroyed[m.method])) for m in measured}
    main = next((name for name in found if facts[name].trained), next(reversed(found), ""))
    return Verdict(
        main=main,
        headline=_headline(found.get(main)),
        score=score,
        level=level,
        n_questions=len(next(iter(base.questions["test"].values()))),
        n_controls=max((null.n_planned for v in found.values() for null in v.nulls.values()), default=0),
        claim=next((str(r.spec.location) for r in records if r.spec.arm == "claim"), ""),
        methods=found,
        margin=design.margin,
        tolerance=tie,
        contrasts=_contrasts(measured, main),
    )


def _headline(v: MethodVerdict | None) -> str:
    return f"CANNOT TELL: {say('headline', 'none')}" if v is None else f"{v.outcome}: {v.reason}"


def _unedited(records: Sequence[TrialRecord], score: str) -> TrialRecord:
    """The record of the unedited model; `RunFolderError` if there is none or it lacks the score."""
    base = find_unedited(records, "a run")
    if not has_score(base.questions["test"], score):
        raise RunFolderError(
            got=f"score = {score}, which the records lack (they have {', '.join(sorted(base.questions['test']))})",
            expected="a score that was measured",
            remedy="choose another score, or run the same command with the judges that this score needs",
        )
    return base


def _judge(m: Measured, adjusted: Mapping[tuple[str, str], float], flags: tuple[Flag, ...]) -> MethodVerdict:
    sign = SIGNS[m.facts.supports]  # -1 undoes the sign flip of `measure`: scores are reported as measured
    names = [flag.name for flag in flags if "claim" in flag.places or flag.name == "superset"]
    questions = ask(m, [*names, *(f"{flag.name} whole" for flag in flags if "whole" in flag.places)])
    answers: dict[str, Answer] = {question.name: question.answer for question in questions}
    outcome = outcome_of(questions)

    def against(name: str, null: Against) -> NullResult:
        seen, plan = null.look, null.plan
        return NullResult(
            name=name,
            can_test=plan.can_test(m.level),
            answer=answers[name],
            controls=tuple(sign * x for x in null.means),
            p_value=null.p_value,
            p_no=null.p_no,
            p_adjusted=adjusted[m.method, name],
            p_new_place=math.nan if m.unscored else new_place_p(m.means[CLAIM], null.means, m.tolerance),
            n_at_least=seen.n_at_least,
            n_planned=plan.n_planned,
            population=plan.population,
            n_used=seen.n,
            ended_early=seen.ended_early,
            lead=sign * null.lead.lead,
            lead_interval=turned(null.lead.interval, sign),
            true_share=null.share.value,
            true_share_interval=null.share.interval,
        )

    gain = m.gain(CLAIM)
    return MethodVerdict(
        method=m.method,
        title=m.facts.title,
        supports=m.facts.supports,
        outcome=outcome,
        reason=explain(m, outcome, questions),
        questions=questions,
        base=sign * m.means[BASE],
        claim=sign * m.means[CLAIM],
        whole_model=sign * m.means[WHOLE] if WHOLE in m.means else None,
        nulls={name: against(name, null) for name, null in m.nulls.items()},
        effect=sign * gain.value,
        effect_interval=turned(gain.interval(), sign),
        effect_p=m.gain_p(CLAIM),
        n_missing=sum(m.missing),
        n_judged=len(m.missing) * m.n_questions,
        worst_missing=m.worst_missing,
        chosen=m.chosen,
        changes={
            place.label: count_changes(values, m.arms[BASE], m.tolerance, sign)
            for place, values in m.arms.items()
            if place.arm != "base"
        },
        flags=flags,
    )


def _contrasts(measured: Sequence[Measured], main: str) -> dict[str, Contrast]:
    """Other method -> whether the claim stands out more by it than by the main method, at the same places."""
    own = next((m for m in measured if m.method == main), None)
    found = {}
    for m in measured:
        if own is None or m is own or m.facts.null != own.facts.null:
            continue
        name = next(iter(own.nulls))
        places = [place for place in own.nulls[name].places if place in m.means]
        if places and (m.facts.supports, m.facts.null) == (own.facts.supports, own.facts.null):
            pairs = [(m.means[place], own.means[place]) for place in (CLAIM, *places)]
            found[m.method] = contrast_methods(pairs[0], pairs[1:], [m.tolerance, own.tolerance])
    return found


def _adjusted(measured: Sequence[Measured]) -> dict[tuple[str, str], float]:
    """(method, null) -> p adjusted for testing several methods at the same controls (max-T within a null)."""
    found: dict[tuple[str, str], float] = {}
    for name in dict.fromkeys(name for m in measured for name in m.nulls):
        tests = [(m, m.nulls[name]) for m in measured if name in m.nulls]
        p_values = [null.p_value for _, null in tests]
        shared = sorted(set.intersection(*(set(null.places) for _, null in tests)))
        if len(tests) > 1 and shared and not any(m.unscored for m, _ in tests):
            controls = np.asarray([[m.means[place] for m, _ in tests] for place in shared])
            together = max_t_p([m.means[CLAIM] for m, _ in tests], controls, [m.tolerance for m, _ in tests])
            adjusted = list(map(max, p_values, together))
        else:  # Bonferroni: max-T needs a score at every claim
            adjusted = [min(1.0, len(tests) * p) for p in p_values]
        found |= {(m.method, name): p for (m, _), p in zip(tests, adjusted, strict=True)}
    return found
