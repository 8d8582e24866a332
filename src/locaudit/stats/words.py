"""The reason of a method's outcome in words, from the texts in words.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence

from locaudit.stats.design import Size, lead_power, questions_for, smallest_gain, smallest_lead
from locaudit.stats.measured import Measured
from locaudit.stats.phrases import say, short, where
from locaudit.stats.questions import Outcome, Question
from locaudit.stats.sequential import Null

POWER = 0.8
"""Power at which the smallest effects that could be seen are given."""


def explain(m: Measured, outcome: Outcome, questions: Sequence[Question]) -> str:
    """Why a method has its outcome, in one sentence."""
    noun, by_name = m.design.noun, {question.name: question for question in questions}
    terms = {key: text.format(noun=noun) for key, text in m.facts.terms.items()}
    asked = [by_name["works"], *(by_name[name] for name in m.deciding)]
    asked.sort(key=lambda q: q.name == "layers")  # a no to another null decides, whatever layers says
    telling = next(
        (q for q in asked if q.answer == {"NOT SPECIFIC": "no", "CANNOT TELL": "open"}.get(outcome)), asked[0]
    )
    beaten = [terms["controls"] + where(name) for name in m.deciding if by_name[name].answer == "yes"]
    values = {
        "where": where(telling.name) if telling.name in m.nulls else "",
        "others": " and ".join(beaten) if len(beaten) < 3 else ", ".join(beaten),
        "why": telling.why[:1].upper() + telling.why[1:],
        "remedy": telling.remedy,
        "margin": m.design.margin,
        "little": "",
        "reached": 1 - m.design.margin,
    }
    if outcome == "SPECIFIC TO ITS LAYERS":
        values["where"] = where("layers")
    small = [name for name, null in m.deciding.items() if null.p_small_lead * len(m.deciding) <= m.level]
    if outcome == "SPECIFIC" and small:
        values["little"] = say("headline", "little", **terms, **{**values, "where": where(small[0])})
    is_common = outcome != "NOT SPECIFIC" or 2 * m.nulls[telling.name].p_common <= m.level
    values["as_well"] = say("headline", "as_well" if is_common else "nearly", **{**terms, **values})
    return say("headline", outcome, **{**terms, **values})


def describe_power(m: Measured) -> str:
    """What the audit of one method could have seen, and what half of that lead takes; empty if the data cannot say.

    The lead is one over each null that can test.
    """
    nulls, parts = [m.plans[name] for name in m.deciding], m.noise
    size = Size(m.n_questions, controls=min(null.n_planned for null in nulls))
    lead = smallest_lead(parts, size, POWER, m.level) if len(parts) == len(nulls) else math.inf
    if not 1e-6 < lead < math.inf:
        return ""
    half = lead / 2
    questions = questions_for(lambda other: lead_power(parts, other, half, m.level), size, POWER)
    decimals = max(2, math.ceil(-math.log10(half)))
    values = {
        **{key: text.format(noun=m.design.noun) for key, text in m.facts.terms.items()},
        "power": POWER,
        "least_gain": short(smallest_gain(parts[0], size, POWER, m.level), decimals),
        "least_lead": short(lead, decimals),
        "target": short(half, decimals),
        "questions": questions,
        "n_questions": m.n_questions,
        "n_controls": size.controls,
    }
    more = say("power", "never" if questions is None else "more", **values)
    return say("power", "line", **values, more=more)


def too_few(name: str, population: int | None, level: float) -> str:
    """A clause about a null whose places are too few to test at the level; empty if there are enough."""
    if Null(0, population).can_test(level):
        return ""
    least = 1 / (1 + (population or 0))
    return say("nulls", "too_few", population=population, where=where(name), least=least, level=level)
