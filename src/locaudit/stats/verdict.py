"""From records to a verdict, in words that cannot be misread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np

from locaudit.errors import RunFolderError
from locaudit.records import Method, TrialRecord, json_text
from locaudit.stats.grades import Grade, conclusion, grade
from locaudit.stats.matching import max_t_p
from locaudit.stats.measured import Design, Measured, measure
from locaudit.stats.scores import components, mean_score, score_values
from locaudit.stats.selection import Place, select
from locaudit.stats.tests import percentiles, t_test_p
from locaudit.stats.words import MAX_MISSING, headline, sentence

Outcome = Literal["no effect", "effective, not specific", "specific", "underpowered"]


@dataclass(frozen=True)
class MethodVerdict:
    """What one way of editing says about the claim. Scores are of the test questions (`locaudit.stats.scores`)."""

    method: Method
    outcome: Outcome
    base: float
    """Score of the unedited model."""
    claim: float
    """Score of the edit at the claim; NaN if it diverged."""
    controls: tuple[float, ...]
    """Score of the edit at each control, by its number; NaN if it diverged."""
    whole_model: float | None
    """Score of the edit of the whole model; None if it was not tried."""
    p_value: float
    """Monte-Carlo p of the claim against the controls; a sequential one if they ended early."""
    p_adjusted: float
    """The same, adjusted for trying several methods at the same controls (`locaudit.stats.max_t_p`)."""
    p_parametric: float
    """The paper's kind of p, for comparison only: one-sample t-test of the controls against the claim's score."""
    n_at_least: int
    """Controls that do at least as well as the claim (diverged ones count)."""
    n_planned: int
    """Controls that were planned."""
    population: int | None
    """Places that controls were drawn from; None: too many to matter."""
    n_used: int
    """Controls that `p_value` and `n_at_least` are of."""
    ended_early: bool
    """Whether the answer was clear before all planned controls were tried."""
    effect: float
    """claim - base."""
    effect_interval: tuple[float, float]
    """95 % bootstrap interval of `effect` over questions."""
    effect_p: float
    """One-sided sign-flip p of `effect`."""
    gap: float
    """claim - mean of the controls that did not diverge."""
    gap_interval: tuple[float, float]
    """95 % bootstrap interval of `gap` over questions, the controls held fixed."""
    grades: tuple[Grade, ...]
    """Sufficiency, specificity, necessity, uniqueness; none if the claim has no score."""
    n_missing: int
    """Judgements of the score's answers that are missing, over all arms compared: (arm, test question) pairs."""
    n_judged: int
    """(arm, test question) pairs in all."""
    worst_missing: float
    """Largest share of an arm's test questions that is missing, or of the validation questions of a hyperparameter that
    could have been chosen for it."""
    chosen: Mapping[str, float | None]
    """Place -> hyperparameter chosen on validation."""
    sentence: str
    """The outcome in words."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison supports. `headline` first: it is what a reader should take away."""

    headline: str
    score: str
    level: float
    n_questions: int
    n_controls: int
    claim: str
    methods: Mapping[str, MethodVerdict]

    def __str__(self) -> str:
        lines = [self.headline, ""]
        for name, verdict in self.methods.items():
            lines.append(f"{name}: {verdict.outcome}. {verdict.sentence}")
            lines += [f"  {g.question}: {g.answer}. {g.evidence}" for g in verdict.grades]
            lines += [f"  {conclusion(verdict.grades)}"] if verdict.grades else []
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text; a number that is missing because an edit diverged is null."""
        return json_text(asdict(self))


def decide(records: Iterable[TrialRecord], *, score: str, level: float = 0.05, design: Design | None = None) -> Verdict:
    """Compare claim, controls, whole model and base on the test questions.

    For each method: `underpowered` if there are too few test questions for any effect to be significant
    (2^-questions > level); `no effect` unless the claim's gain over the unedited model passes a one-sided paired
    sign-flip test at `level`; then `underpowered` if 1 / (1 + N) > level, so that no outcome could be significant, or
    while planned controls are missing; then
    `specific` if the Monte-Carlo p is at most `level`, else `effective, not specific`. Where controls end early, the
    rule of `design` decides (`locaudit.stats.sequential`). A score of judged answers of which more than `MAX_MISSING`
    are missing in any arm is `underpowered` too: answers that a judge fails on are no random sample. Beside the outcome
    stand four grades (`locaudit.stats.grades`).

    A method whose claim has no record yet is left out, so that the records of an unfinished audit can be judged; raises
    `RunFolderError` while the unedited model has no scores.

    Deviation from the paper: it compares by a parametric p-value over random sets; the Monte-Carlo p assumes no shape.
    Definitions and assumptions: docs/statistics.md.
    """
    records = list(records)
    _check_scored(records, score)
    chosen = select(records, score)
    base = next((r for r in records if r.spec.arm == "base" and r.status == "ok"), None)
    if base is None:
        raise RunFolderError(
            got="no scores of the unedited model, so that nothing is scored yet",
            expected="at least the record of the unedited model",
            remedy="run the audit first, or again if it was stopped",
        )
    claim_text = next((r.spec.location for r in records if r.spec.arm == "claim"), "")
    methods: dict[str, MethodVerdict] = {
        method: _judge_method(
            measure(method, base, chosen[method], records, score, level, design or Design()),
            chosen[method],
            records,
            score,
        )
        for method in ("iti", "optimal")
        if ("claim", -1) in chosen.get(method, {})
    }
    _adjust(methods)
    return Verdict(
        headline=headline(methods),
        score=score,
        level=level,
        n_questions=len(base.questions["test"][components(score)[0]]),
        n_controls=max((v.n_planned for v in methods.values()), default=0),
        claim=claim_text,
        methods=methods,
    )


def _check_scored(records: list[TrialRecord], score: str) -> None:
    """An unedited model without the score: nothing was judged, or the score is none."""
    base = next((r for r in records if r.spec.arm == "base" and r.status == "ok"), None)
    if base is not None and not all(name in base.questions["test"] for name in components(score)):
        raise RunFolderError(
            got=f"score = {score} and records without it (they have {', '.join(sorted(base.questions['test']))})",
            expected="a score that was measured",
            remedy="choose another score, or run the same command with judges for Truth and Info",
        )


def _judge_method(
    m: Measured, chosen: Mapping[Place, TrialRecord | None], records: Sequence[TrialRecord], score: str
) -> MethodVerdict:
    scored = [m.base, *(score_values(r.questions["test"], score) for r in chosen.values() if r is not None)]
    missing = [int(np.isnan(x).any(axis=0).sum()) for x in scored]
    worst = max([max(missing) / m.n_questions, *_lost_in_choosing(records, m.method, score)])
    p_value = 1.0 if m.unscored else m.look.p_value
    base = float(mean_score(m.base))
    verdict = MethodVerdict(
        method=m.method,
        outcome=_outcome(m, worst),
        base=base,
        claim=m.claim_mean,
        controls=m.control_means,
        whole_model=None if m.whole is None else float(mean_score(m.whole)),
        p_value=p_value,
        p_adjusted=p_value,
        p_parametric=math.nan if m.unscored else t_test_p(m.claim_mean, m.control_means),
        n_at_least=m.look.n_at_least,
        n_planned=m.n_planned,
        population=m.design.population,
        n_used=m.look.n,
        ended_early=m.look.state != "open" and m.look.n < m.n_planned,
        effect=m.claim_mean - base,
        effect_interval=percentiles(m.gains, 0.95),
        effect_p=m.effect_p,
        gap=m.claim_mean - float(np.mean([mean_score(x) for x in m.finite_controls])) if m.leads.size else math.nan,
        gap_interval=percentiles(m.leads, 0.95),
        grades=grade(m) if m.design.graded and worst <= MAX_MISSING and 2.0**-m.n_questions <= m.level else (),
        n_missing=sum(missing),
        n_judged=len(scored) * m.n_questions,
        worst_missing=worst,
        chosen={
            f"control {n}" if arm == "control" else arm: None if record is None else record.spec.hyperparameter
            for (arm, n), record in sorted(chosen.items())
        },
        sentence="",
    )
    return replace(verdict, sentence=sentence(verdict, score, m.level, m.n_questions))


def _outcome(m: Measured, worst_missing: float) -> Outcome:
    if m.unscored or 2.0**-m.n_questions > m.level or worst_missing > MAX_MISSING:
        return "underpowered"
    if m.effect_p > m.level:
        return "no effect"
    if m.look.state == "open":
        return "underpowered"
    return "specific" if m.look.state == "specific" else "effective, not specific"


def _adjust(methods: dict[str, MethodVerdict]) -> None:
    """P of each method, adjusted for the others where all were tried at the same controls."""
    verdicts = list(methods.values())
    n = min((v.n_used for v in verdicts), default=0)
    if len(verdicts) < 2:
        return
    if not n or any(math.isnan(v.claim) for v in verdicts):  # Bonferroni's
        for name, verdict in methods.items():
            methods[name] = replace(verdict, p_adjusted=min(1.0, len(verdicts) * verdict.p_value))
        return
    controls = np.asarray([v.controls[:n] for v in verdicts]).T
    for (name, verdict), p in zip(methods.items(), max_t_p([v.claim for v in verdicts], controls), strict=True):
        methods[name] = replace(verdict, p_adjusted=max(p, verdict.p_value))


def _lost_in_choosing(records: Sequence[TrialRecord], method: Method, score: str) -> Iterator[float]:
    """Missing shares on validation of the trials among which a hyperparameter was chosen."""
    for record in records:
        split = record.questions.get("val", {})
        if record.spec.method == method and all(name in split for name in components(score)):
            values = score_values(split, score)
            yield float(np.isnan(values).any(axis=0).mean())
