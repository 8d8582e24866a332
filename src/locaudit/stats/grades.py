"""Four questions about a claim, each with its own evidence: sufficiency, specificity, necessity, uniqueness.

An answer is ``yes`` or ``no`` only where the numbers exclude the other one, and ``undecided`` otherwise. Definitions,
assumptions and what a "no" does not mean: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from locaudit.stats.matching import Match, compare_edits, holm
from locaudit.stats.measured import Measured
from locaudit.stats.scores import mean_score
from locaudit.stats.sequential import controls_to_decide, share_interval, specificity_power
from locaudit.stats.tests import percentiles

_FEW = "too few answers changed to say what could have been seen"
MOST_PLACES = 100
"""Places compared one by one with the claim."""
Question = Literal["sufficiency", "specificity", "necessity", "uniqueness"]
Answer = Literal["yes", "no", "undecided", "not tried"]
POWER = 0.8
"""Power of the smallest effect that is reported as detectable."""
RARE = 0.01
"""Share of places as good as the claim for which the power to call it specific is given."""


@dataclass(frozen=True)
class Grade:
    """One question about a claim, answered as far as the numbers allow."""

    question: Question
    answer: Answer
    estimate: float
    """The quantity that decides (`quantity`); NaN where nothing was measured."""
    interval: tuple[float, float]
    quantity: str
    """What `estimate` and `interval` are of, with the interval's confidence."""
    p: float
    """p of the test behind the answer; NaN where there is none."""
    power: str
    """What this audit could have seen."""
    evidence: str
    """The answer in words."""


def grade(m: Measured) -> tuple[Grade, ...]:
    """The four grades of one way of editing; nothing is graded where the claim has no score."""
    if m.unscored:
        return ()
    return _sufficiency(m), _specificity(m), _necessity(m), _uniqueness(m)


def _sufficiency(m: Measured) -> Grade:
    gain, margin = m.gain, m.design.margin
    answer: Answer = "yes" if m.effect_p <= m.level else "no" if gain.below else "undecided"
    words = {
        "yes": "an edit there works",
        "no": f"no edit found there gains as much as the margin of {margin:g}",
        "undecided": "no gain was shown, and none of the margin's size is excluded",
    }[answer]
    if m.whole is not None and not math.isnan(float(mean_score(m.whole))):
        against = compare_edits(m.claim, m.whole, margin=margin)
        words += f"; it {_reach(against)} the edit of the whole model ({_difference(against)})"
    least = float(stats.norm.ppf(1 - m.level) + stats.norm.ppf(POWER)) * float(m.gains.std(ddof=1))
    sure = least > 0 and not gain.few
    return Grade(
        "sufficiency",
        answer,
        gain.difference,
        percentiles(m.gains, 0.95),
        "gain over the unedited model, 95 % over questions",
        m.effect_p,
        f"a gain of {least:.3f} is detected with probability {POWER:g}, at the spread seen" if sure else _FEW,
        words,
    )


def _specificity(m: Measured) -> Grade:
    n, g = m.look.n, m.look.n_at_least
    low, high = share_interval(g, n, population=m.design.population)
    works = m.effect_p <= m.level
    answer: Answer = "undecided"
    if works and m.look.state == "specific":
        answer = "yes"
    elif low > m.level:
        answer = "no"
    words = f"{g} of {n} random places do at least as well, so that a share of {low:.3f} to {high:.3f} of all would"
    if m.lead is not None:
        words += f"; the claim's lead over their mean is {_difference(m.lead)}"
        words += f", equivalent to within {m.design.margin:g}" if m.lead.equivalent else ""
    if answer == "undecided" and works and (total := controls_to_decide(g, n, m.level, m.design.population)):
        if total > n:
            seconds = m.design.seconds.get(m.method)
            cost = "" if seconds is None else f", {_hours((total - n) * seconds)} more"
            words += f"; if it goes on so, about {total} controls with stopping: anytime settle whether that is above "
            words += f"{m.level:g}{cost}"
    elif answer == "undecided" and not works:
        words += "; the claim's own gain was not shown, so there is nothing to be specific about"
    power = specificity_power(m.n_planned, m.level, RARE, m.design.rule)
    return Grade(
        "specificity",
        answer,
        g / n if n else math.nan,
        (low, high),
        "share of random places that do at least as well, 95 % at every moment",
        m.look.p_value,
        f"a claim that {RARE:.0%} of places match is called specific with probability {power:.2f}",
        words,
    )


def _necessity(m: Measured) -> Grade:
    quantity = "best edit of all but the claim minus that of the whole model, 90 % over questions"
    if m.rest is None or m.whole is None:
        return _not_tried("necessity", quantity, "the model without the claim was not edited")
    margin = m.design.margin
    against = compare_edits(m.rest, m.whole, margin=margin)
    gain = compare_edits(m.whole, m.base, margin=margin)
    answer: Answer = "undecided"
    if not gain.interval[0] > margin or gain.few:
        words = "the edit of the whole model has no sure gain above the margin that could be lost"
    elif against.outcome == "not worse":
        answer, words = "no", "barred from the claim, an edit of the rest does as well as one of the whole model"
    elif against.outcome == "worse":
        answer, words = "yes", "barred from the claim, the best edit of the rest falls short of the whole model's"
    else:
        words = "the questions are too few to tell whether barring the claim costs anything"
    return Grade(
        "necessity", answer, against.difference, against.interval, quantity, against.p, _width(against, margin),
        f"{words} ({_difference(against)}, margin {margin:g})",
    )  # fmt: skip


def _uniqueness(m: Measured) -> Grade:
    quantity = "share of the places tried, apart from the claim and each other, that match it"
    apart = _apart(m)[:MOST_PLACES]
    if not apart:
        return _not_tried("uniqueness", quantity, "no control lies apart from the claim")
    if m.effect_p > m.level:
        return _not_tried("uniqueness", quantity, "the claim's own gain was not shown")
    margin = m.design.margin
    sure = m.gain.interval[0] > margin
    matches = [compare_edits(m.controls[i], m.claim, margin=margin) for i in apart]
    adjusted = holm([match.p for match in matches])
    n_match, n = sum(p <= m.level and not x.few for p, x in zip(adjusted, matches, strict=True)), len(apart)
    n_worse = sum(match.outcome == "worse" for match in matches)
    every = n == m.design.population and not m.design.matched and m.location is not None and len(m.location) == 1
    answer: Answer = "no" if n_match else "yes" if every and n_worse == n else "undecided"
    if not sure:
        answer = "undecided"
    words = (
        f"{n_match} of {n} places that share no unit with the claim or each other match it to within {margin:g} "
        f"(after Holm's correction), {n_worse} fall short, for {n - n_match - n_worse} the questions are too few"
    )
    if not sure:
        words += "; but the claim's gain is not surely above the margin, so that to match it says little"
    elif answer == "undecided" and n_worse == n:
        words += "; places that were not drawn may still match it"
    return Grade(
        "uniqueness", answer, n_match / n, (math.nan, math.nan), quantity,
        min(adjusted), f"{n} disjoint places were tried", words,
    )  # fmt: skip


def _apart(m: Measured) -> list[int]:
    """Controls that share no unit with the claim or with an earlier one of these: chosen before any score is seen."""
    taken = set(m.location.units) if m.location else set()
    out = []
    for number, place in sorted(m.places.items()):
        if not taken & set(place.units):
            taken |= set(place.units)
            out.append(number)
    return out


def _not_tried(question: Question, quantity: str, why: str) -> Grade:
    return Grade(question, "not tried", math.nan, (math.nan, math.nan), quantity, math.nan, "", why)


def _reach(match: Match) -> str:
    if match.equivalent:
        return "is equivalent to"
    return {"not worse": "does at least as well as", "worse": "falls short of"}.get(
        match.outcome, "cannot be told apart, nor shown equal, to"
    )


def _difference(match: Match) -> str:
    return f"{match.difference:+.3f}, 90 %: {match.interval[0]:+.3f} to {match.interval[1]:+.3f}"


def _width(match: Match, margin: float) -> str:
    half = (match.interval[1] - match.interval[0]) / 2
    return f"the difference is known to ±{half:.3f}, the margin is {margin:g}"


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def conclusion(grades: Sequence[Grade]) -> str:
    """The grades in one sentence; empty for none."""
    found = {grade.question: grade.answer for grade in grades}
    if not found:
        return ""
    parts = [
        {
            "yes": "an edit there is enough",
            "no": "no edit there is enough",
            "undecided": "it is not shown that an edit there is enough",
        }.get(found["sufficiency"], ""),
        {
            "yes": "the place does better than random ones",
            "no": "random places do as well",
            "undecided": "whether random places do as well is open",
        }.get(found["specificity"], ""),
        {
            "yes": "editing falls short without it",
            "no": "the rest of the model reaches the same without it",
            "undecided": "whether it is needed is open",
        }.get(found["necessity"], ""),
        {"yes": "no other place of its size matches it", "no": "it is not the only such place"}.get(
            found["uniqueness"], ""
        ),
    ]
    said = [part for part in parts if part]
    text = "; ".join(said)
    return text[0].upper() + text[1:] + "."
