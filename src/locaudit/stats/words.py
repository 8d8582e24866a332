"""The reason of a method's outcome in words, from the texts in words.toml."""

from __future__ import annotations

from collections.abc import Sequence

from locaudit.stats.measured import Measured
from locaudit.stats.phrases import say, where
from locaudit.stats.questions import WITHIN, Outcome, Question
from locaudit.stats.selection import CLAIM
from locaudit.stats.sequential import Null


def explain(m: Measured, outcome: Outcome, questions: Sequence[Question]) -> str:
    """Why a method has its outcome, in one sentence."""
    noun, by_name = m.design.noun, {question.name: question for question in questions}
    terms = {key: text.format(noun=noun) for key, text in m.facts.terms.items()}
    asked = [by_name["works"], *(by_name[name] for name in m.deciding)]
    asked.sort(key=lambda q: q.name in WITHIN)  # a no to another null decides, whatever these say
    decides = {"NOT SPECIFIC": "no", "SPECIFIC TO ITS LAYERS": "no", "CANNOT TELL": "open"}.get(outcome)
    telling = next((question for question in asked if question.answer == decides), asked[0])
    beaten = [terms["controls"] + where(name) for name in m.deciding if by_name[name].answer == "yes"]
    values = {
        "where": where(telling.name) if telling.name in m.nulls else "",
        "others": " and ".join(beaten) if len(beaten) < 3 else ", ".join(beaten),
        "why": telling.why[:1].upper() + telling.why[1:],
        "remedy": telling.remedy,
        "margin": m.design.margin,
        "little": "",
    }
    small = [name for name, null in m.deciding.items() if null.p_small_lead * len(m.deciding) <= m.level]
    if small := [name for name in small if by_name[name].answer == "yes"]:
        values["little"] = say("headline", "little", **terms, **{**values, "where": where(small[0])})
    if decides == "no":
        null = m.nulls[telling.name]
        reached = 1 - null.lead.lead / m.gain(CLAIM).value
        values |= {"g": null.look.n_at_least, "n": null.look.n, "reached": reached}
        which = "as_well" if 2 * null.p_common <= m.level else "nearly" if reached < 1 else "alike"
        values["as_well"] = say("headline", which, **{**terms, **values})
    return say("headline", outcome, **{**terms, **values})


def too_few(name: str, population: int | None, level: float) -> str:
    """A clause about a null whose places are too few to test at the level; empty if there are enough."""
    if Null(0, population).can_test(level):
        return ""
    least = 1 / (1 + (population or 0))
    return say("nulls", "too_few", population=population, where=where(name), least=least, level=level)
