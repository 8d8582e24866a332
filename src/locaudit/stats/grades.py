"""Four questions about a claim, each with its own evidence: sufficiency, specificity, necessity, uniqueness.

An answer is ``yes`` or ``no`` only if a test or an interval excludes the opposite answer. Otherwise it is
``undecided``. Definitions, assumptions and what a "no" does not mean are in docs/statistics.md. The texts are in
words.toml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scipy import stats

from locaudit.stats.equivalence import Match
from locaudit.stats.measured import Measured
from locaudit.stats.phrases import say, where
from locaudit.stats.selection import BASE, CLAIM, REST, WHOLE
from locaudit.stats.sequential import Null, controls_to_decide, share_interval, specificity_power
from locaudit.stats.tests import holm

Question = Literal["sufficiency", "specificity", "necessity", "uniqueness"]
Answer = Literal["yes", "no", "undecided", "not tried"]
POWER = 0.8
"""Power at which the smallest detectable effect is reported."""
RARE = 0.01
"""The power of the specificity test is reported for a claim that is matched by this share of random places."""
_UNKNOWN = (math.nan, math.nan)


@dataclass(frozen=True)
class Grade:
    """The answer to one question about a claim, with its evidence."""

    question: Question
    answer: Answer
    estimate: float
    """The quantity that decides, described by `quantity`; NaN if nothing was measured."""
    interval: tuple[float, float]
    quantity: str
    """What `estimate` is, and the confidence of its `interval`."""
    p: float
    """p of the test behind the answer; NaN if there is no test."""
    power: str
    """The effect size that this audit could have detected, in words."""
    evidence: str
    """The answer in words."""
    clause: str
    """The answer as a part of the sentence `conclusion`; empty if it adds nothing."""


def _words(m: Measured, part: str) -> Callable[..., str]:
    """A function that fills in the texts of one part of words.toml with the method's terms."""
    return partial(say, part, **m.facts.terms, margin=m.design.margin, level=m.level)


def _answer(
    words: Callable[..., str], question: Question, answer: Answer, evidence: str,
    estimate: float = math.nan, interval: tuple[float, float] = _UNKNOWN, p: float = math.nan, power: str = "",
) -> Grade:  # fmt: skip
    """A grade, with the texts that follow from its answer."""
    return Grade(question, answer, estimate, interval, words("quantity"), p, power, evidence, words(f"clause.{answer}"))


def grade(m: Measured) -> tuple[Grade, ...]:
    """The grades of one method; none if the data allow no conclusion (`Measured.nothing_to_say`).

    If higher scores support the claim, all four questions are asked. If lower scores support it (an ablation), a fall
    of the score answers necessity, and sufficiency is not asked.
    """
    if m.nothing_to_say:
        return ()
    if m.facts.supports == "lower":
        return _effect(m, "necessity", "fall"), _specificity(m), _uniqueness(m)
    return _effect(m, "sufficiency", "sufficiency"), _specificity(m), _necessity(m), _uniqueness(m)


def _effect(m: Measured, question: Question, part: str) -> Grade:
    """Sufficiency: whether the claim's gain is significant. For an ablation, necessity: whether the score falls."""
    words, gain = _words(m, part), m.gain
    answer: Answer = "yes" if m.effect_p <= m.level else "no" if gain.below else "undecided"
    evidence = words(answer)
    if not math.isnan(m.means.get(WHOLE, math.nan)):
        against = m.compare(CLAIM, WHOLE)
        reach = say("match", "equivalent" if against.equivalent else against.outcome)
        evidence += words("whole", reach=reach, difference=_difference(against))
    # Smallest gain that a one-sided z-test at `level` detects with probability POWER: (z_level + z_power) * SE.
    least = float(stats.norm.ppf(1 - m.level) + stats.norm.ppf(POWER)) * gain.sd
    power = words("power" if least > 0 and not gain.few else "no_power", least=least, power=POWER)
    return _answer(words, question, answer, evidence, gain.difference, gain.interval_95, m.effect_p, power)


def _specificity(m: Measured) -> Grade:
    """Yes: the test against each null says specific. No: a share of matching places is above the level.

    Nulls with too few places to test are left out. For a no, one null is enough.
    """
    words, works, found = _words(m, "specificity"), m.effect_p <= m.level, []
    intervals: dict[str, tuple[float, float]] = {}
    for name, null in m.deciding.items():
        n, g = null.look.n, null.look.n_at_least
        low, high = intervals[name] = share_interval(g, n, population=null.plan.population)
        found.append(words("seen", g=g, n=n, low=low, high=high, where=where(name)))
        if null.lead is not None:
            found[-1] += words("lead", difference=_difference(null.lead))
            found[-1] += words("equivalent") if null.lead.equivalent else ""
    # What decides is the null that the claim stands out from the least: the claim must stand out from all.
    name, worst = max(m.deciding.items(), key=lambda item: item[1].look.p_value)
    n, g, plan, evidence = worst.look.n, worst.look.n_at_least, worst.plan, "; ".join(found)
    answer: Answer = "undecided"
    if works and all(null.look.state == "specific" for null in m.deciding.values()):
        answer = "yes"
    elif any(low > m.level for low, _ in intervals.values()):
        answer = "no"
    elif works:
        total = controls_to_decide(g, n, m.level, plan.population)
        if total is not None and total > n:
            evidence += words("more", total=total)
            if m.method in m.design.seconds:
                evidence += words("cost", time=_time((total - n) * m.design.seconds[m.method]))
    else:
        evidence += words("no_gain")
    power = words("power", rare=RARE, power=specificity_power(plan.n_planned, m.level, RARE, m.design.rule))
    share, low = g / n if n else math.nan, max(intervals, key=lambda null: intervals[null][0])
    words = partial(words, where=where({"yes": "", "no": low}.get(answer, name)))
    return _answer(words, "specificity", answer, evidence, share, intervals[name], worst.look.p_value, power)


def _necessity(m: Measured) -> Grade:
    """Non-inferiority test: the best edit found of everything but the claim against that of the whole model."""
    words, margin = _words(m, "necessity"), m.design.margin
    if REST not in m.arms or WHOLE not in m.arms:
        return _answer(words, "necessity", "not tried", words("not_tried"))
    against, gain = m.compare(REST, WHOLE), m.compare(WHOLE, BASE)
    # If the whole model barely gains, even an edit that does nothing would be "not worse". Then there is no answer.
    is_sure = gain.interval[0] > margin and not gain.few
    answers: dict[str, Answer] = {"not worse": "no", "worse": "yes"}
    answer = answers.get(against.outcome, "undecided") if is_sure else "undecided"
    evidence = words("seen", why=words(answer if is_sure else "no_gain"), difference=_difference(against))
    power = words("power", half=(against.interval[1] - against.interval[0]) / 2)
    return _answer(words, "necessity", answer, evidence, against.difference, against.interval, against.p, power)


def _uniqueness(m: Measured) -> Grade:
    """Holm-corrected non-inferiority tests of disjoint controls against the claim. If one matches, the answer is no."""
    words = _words(m, "uniqueness")
    if not m.apart or m.effect_p > m.level:
        return _answer(words, "uniqueness", "not tried", words("no_gain" if m.apart else "not_tried"))
    matches, is_sure = [m.compare(place, CLAIM) for place in m.apart], m.gain.interval[0] > m.design.margin
    adjusted = holm([match.p for match in matches])
    n_match, n = sum(p <= m.level and not x.few for p, x in zip(adjusted, matches, strict=True)), len(matches)
    n_worse = sum(match.outcome == "worse" for match in matches)
    # "No other place matches" can be shown only if the claim is a single unit and the controls are all other units.
    anywhere = m.plans.get("anywhere", Null(0))
    is_all = n == anywhere.population and len(m.locations[CLAIM]) == 1
    answer: Answer = "undecided"
    if is_sure:
        answer = "no" if n_match else "yes" if is_all and n_worse == n else "undecided"
    evidence = words("seen", n_match=n_match, n=n, n_worse=n_worse, n_open=n - n_match - n_worse)
    if not is_sure:
        evidence += words("unsure")
    elif answer == "undecided" and n_worse == n:
        evidence += words("not_all")
    power = words("power", n=n)
    return _answer(words, "uniqueness", answer, evidence, n_match / n, _UNKNOWN, min(adjusted), power)


def _difference(match: Match) -> str:
    return say("match", "difference", match=match)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def conclusion(grades: Sequence[Grade]) -> str:
    """The grades in one sentence; empty if there are none."""
    text = "; ".join(grade.clause for grade in grades if grade.clause)
    return f"{text[0].upper()}{text[1:]}." if text else ""
