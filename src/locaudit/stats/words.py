"""The reason of a method's outcome in words, from the texts in words.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence

from locaudit.stats.measured import Measured
from locaudit.stats.phrases import say, short, where
from locaudit.stats.questions import Outcome, Question
from locaudit.stats.sequential import Null


def explain(m: Measured, outcome: Outcome, questions: Sequence[Question]) -> str:
    """Why a method has its outcome, in one sentence."""
    noun, by_name = m.design.noun, {question.name: question for question in questions}
    terms = {key: text.format(noun=noun) for key, text in m.facts.terms.items()}
    asked = [by_name["works"], *(by_name[name] for name in m.deciding)]
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
    }
    if outcome == "SPECIFIC TO ITS LAYERS":
        values["where"] = where("layers")
    small = [name for name, null in m.deciding.items() if null.p_small_lead * len(m.deciding) <= m.level]
    if outcome == "SPECIFIC" and small:
        values["little"] = say("headline", "little", **terms, **{**values, "where": where(small[0])})
    return say("headline", outcome, **{**terms, **values})


def describe_power(m: Measured) -> str:
    """What the audit of one method could have seen, and what half of that lead takes; empty if the data cannot say."""
    found = m.power
    if found is None or not 1e-6 < found.lead < math.inf:
        return ""
    decimals = max(2, math.ceil(-math.log10(found.target))) if found.target > 0 else 2
    name = next(iter(m.deciding))
    values = {
        **{key: text.format(noun=m.design.noun) for key, text in m.facts.terms.items()},
        "found": found,
        "least_gain": short(found.gain, decimals),
        "least_lead": short(found.lead, decimals),
        "target": short(found.target, decimals),
        "where": where(name),
        "n_questions": m.n_questions,
        "n_controls": m.plans[name].n_planned,
        "folder": m.design.folder,
    }
    more = say("power", "never" if found.questions is None else "more", **values)
    return say("power", "line", **values, more=more)


def too_few(name: str, population: int | None, level: float) -> str:
    """A clause about a null whose places are too few to test at the level; empty if there are enough."""
    if Null(0, population).can_test(level):
        return ""
    least = 1 / (1 + (population or 0))
    return say("nulls", "too_few", population=population, where=where(name), least=least, level=level)
