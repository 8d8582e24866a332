"""From records to a verdict, in words that cannot be misread."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from locaudit.errors import RunFolderError
from locaudit.records import Method, TrialRecord
from locaudit.stats.selection import Place, select
from locaudit.stats.tests import monte_carlo_p, paired_gain_p, paired_interval

Outcome = Literal["no effect", "effective, not specific", "specific", "underpowered"]

METHOD_NAMES: Mapping[str, str] = {"iti": "ITI", "optimal": "the optimal edit"}
"""How sentences call a method."""


@dataclass(frozen=True)
class MethodVerdict:
    """What one way of editing says about the claim. Scores are means over the test questions."""

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
    """Monte-Carlo p of the claim against the controls."""
    n_at_least: int
    """Controls that do at least as well as the claim (diverged ones count)."""
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
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text; a number that is missing because an edit diverged is null."""
        return json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False) + "\n"


def decide(records: Iterable[TrialRecord], *, score: str, level: float = 0.05) -> Verdict:
    """Compare claim, controls, whole model and base on the test questions.

    For each method: `underpowered` if there are too few test questions for any effect to be significant
    (2^-questions > level); `no effect` unless the claim's gain over the unedited model passes a one-sided paired
    sign-flip test at `level`; then `underpowered` if 1 / (1 + N) > level, so that no outcome could be significant; then
    `specific` if the Monte-Carlo p is at most `level`, else `effective, not specific`.

    A method whose claim has no record yet is left out, so that the records of an unfinished audit can be judged; raises
    `RunFolderError` while the unedited model has no scores.

    Deviation from the paper: it compares by a parametric p-value over random sets; the Monte-Carlo p assumes no shape.
    """
    records = list(records)
    chosen = select(records, score)
    base = next((r for r in records if r.spec.arm == "base" and r.status == "ok"), None)
    if base is None:
        raise RunFolderError(
            got="no scores of the unedited model, so that nothing is scored yet",
            expected="at least the record of the unedited model",
            remedy="run the audit first, or again if it was stopped",
        )
    claim_text = next((r.spec.location for r in records if r.spec.arm == "claim"), "")
    methods = {
        method: _judge_method(method, base, chosen[method], score, level)
        for method in ("iti", "optimal")
        if ("claim", -1) in chosen.get(method, {})
    }
    return Verdict(
        headline=_headline(methods),
        score=score,
        level=level,
        n_questions=len(base.questions["test"][score]),
        n_controls=max((len(v.controls) for v in methods.values()), default=0),
        claim=claim_text,
        methods=methods,
    )


def _judge_method(
    method: Method, base: TrialRecord, places: Mapping[Place, TrialRecord | None], score: str, level: float
) -> MethodVerdict:
    def values(record: TrialRecord | None) -> np.ndarray:
        n = len(base.questions["test"][score])
        return np.full(n, np.nan) if record is None else np.asarray(record.questions["test"][score], dtype=float)

    claim = values(places["claim", -1])
    controls = [values(record) for (arm, _), record in sorted(places.items()) if arm == "control"]
    before = values(base)
    control_means = tuple(float(np.mean(x)) for x in controls)
    finite_controls = [x for x in controls if not np.isnan(x).any()]
    diverged = bool(np.isnan(claim).any())
    claim_mean = float(np.mean(claim))
    effect_p = 1.0 if diverged else paired_gain_p(claim, before)
    p_value = 1.0 if diverged else monte_carlo_p(claim_mean, control_means)
    gap_ready = finite_controls and not diverged
    mean_control = np.mean(finite_controls, axis=0) if gap_ready else claim
    nan_pair = (math.nan, math.nan)
    outcome: Outcome
    if diverged or 2.0 ** -len(before) > level:
        outcome = "underpowered"
    elif effect_p > level:
        outcome = "no effect"
    elif 1 / (1 + len(controls)) > level:
        outcome = "underpowered"
    else:
        outcome = "specific" if p_value <= level else "effective, not specific"
    whole = places.get(("whole", -1))
    verdict = MethodVerdict(
        method=method,
        outcome=outcome,
        base=float(np.mean(before)),
        claim=claim_mean,
        controls=control_means,
        whole_model=float(np.mean(values(whole))) if ("whole", -1) in places else None,
        p_value=p_value,
        n_at_least=int(np.sum(~(np.asarray(control_means) < claim_mean))),
        effect=claim_mean - float(np.mean(before)),
        effect_interval=nan_pair if diverged else paired_interval(claim, before),
        effect_p=effect_p,
        gap=claim_mean - float(np.mean(mean_control)) if gap_ready else math.nan,
        gap_interval=paired_interval(claim, mean_control) if gap_ready else nan_pair,
        chosen={
            f"control {n}" if arm == "control" else arm: None if record is None else record.spec.hyperparameter
            for (arm, n), record in sorted(places.items())
        },
        sentence="",
    )
    return MethodVerdict(**{**verdict.__dict__, "sentence": _sentence(verdict, score, level, len(before))})


def _sentence(v: MethodVerdict, score: str, level: float, n_questions: int) -> str:
    n = len(v.controls)
    low, high = v.effect_interval
    if math.isnan(v.claim):
        return (
            "Every edit tried at the claim diverged, so nothing was measured: lower the learning rate or the strength."
        )
    change = (
        f"{score} goes from {v.base:.3f} unedited to {v.claim:.3f} with the edit at the claim "
        f"({v.effect:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, p = {v.effect_p:.4f})"
    )
    whole = "" if v.whole_model is None else f" The same edit of the whole model reaches {v.whole_model:.3f}."
    if v.whole_model is not None and math.isnan(v.whole_model):
        whole = " The same edit of the whole model diverged."
    diverged = sum(map(math.isnan, v.controls))
    lost = f" ({diverged} of them diverged and count against the claim)" if diverged else ""
    beaten = f"{v.n_at_least} of {n} random locations do at least as well{lost} (Monte-Carlo p = {v.p_value:.3f})"
    if not math.isnan(v.gap):
        beaten += (
            f", the claim's lead over their mean is {v.gap:+.3f} ({v.gap_interval[0]:+.3f} to {v.gap_interval[1]:+.3f})"
        )
    if v.outcome == "no effect":
        return f"No improvement was detected on held-out questions: {change}.{whole} For comparison, {beaten}."
    if v.outcome == "underpowered" and 2.0**-n_questions > level:
        need = math.ceil(-math.log2(level))
        return (
            f"{n_questions} test questions cannot show any effect at level {level:g}: the smallest possible p is "
            f"{2.0**-n_questions:.3f}. Use at least {need}. So far {change}, and {beaten}."
        )
    if v.outcome == "underpowered":
        need = math.ceil(1 / level - 1e-9) - 1
        return (
            f"Editing the claim works: {change}.{whole} But {n} controls cannot decide whether the place matters: the "
            f"smallest possible p is {1 / (1 + n):.3f}, above {level:g}. Use at least {need} controls, in a "
            f"new run folder. So far {beaten}."
        )
    if v.outcome == "specific":
        return (
            f"Editing the claim works better than editing random locations of its size: {change}; {beaten}.{whole} "
            "This is evidence that the claim is a better place to edit than a random one, not that it is the only or a "
            "necessary one."
        )
    return (
        f"Editing the claim works, but it does not stand out from random locations: {change}; {beaten}.{whole} "
        "Success of this edit is no evidence that the behaviour is localized at the claim, nor is it evidence against."
    )


def _headline(methods: Mapping[str, MethodVerdict]) -> str:
    iti, optimal = methods.get("iti"), methods.get("optimal")
    answered = optimal is not None and optimal.outcome in ("effective, not specific", "no effect")
    if iti and optimal and iti.outcome == "specific" and answered:
        why = {
            "effective, not specific": "with its best edit, the claim does not stand out from random locations",
            "no effect": "trained there, no improvement was detected on held-out questions",
        }[optimal.outcome]
        return f"ITI alone would call the claim specific, but the optimal edit does not ({optimal.outcome}): {why}."
    main = optimal or iti
    if main is None:
        return "No edit at the claim is scored, so there is no verdict."
    subject = "Optimal edits give" if main is optimal else "ITI edits give"
    if main.outcome == "specific":
        return f"{subject} evidence for the claim: editing there works better than at random locations."
    if main.outcome == "effective, not specific":
        return (
            f"{subject} no evidence for the claim: it works there, but the claim does not stand out from random places."
        )
    if main.outcome == "no effect":
        return f"{subject} no evidence for the claim: no improvement was detected on held-out questions."
    lack = "nothing was measured" if math.isnan(main.claim) else "too few controls or test questions"
    return f"{subject} no answer yet: {lack}."


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
