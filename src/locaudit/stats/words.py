"""The reason of a method's outcome in words, from the texts in words.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence

from locaudit.stats.measured import Measured
from locaudit.stats.phrases import say, where
from locaudit.stats.questions import Outcome, Question
from locaudit.stats.selection import CLAIM, WHOLE
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
        "most": math.nan,
        "little": "",
    }
    if outcome == "SPECIFIC TO ITS LAYERS":
        values["where"] = where("layers")
    if outcome == "NO GAIN SHOWN":
        values["most"] = max(0.0, m.gain(CLAIM).interval()[1] / m.gain(WHOLE).value)
    if outcome == "SPECIFIC" and any(null.p_small_lead <= m.level for null in m.deciding.values()):
        values["little"] = say("headline", "little", **terms, **values)
    return say("headline", outcome, **{**terms, **values})


def too_few(name: str, population: int | None, level: float) -> str:
    """A clause about a null whose places are too few to test at the level; empty if there are enough."""
    if Null(0, population).can_test(level):
        return ""
    least = 1 / (1 + (population or 0))
    return say("nulls", "too_few", population=population, where=where(name), least=least, level=level)
