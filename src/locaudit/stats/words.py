"""The sentences of a verdict, from the texts in words.toml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from locaudit.stats.phrases import MethodFacts, say, where
from locaudit.stats.scores import MAX_MISSING, SIGNS
from locaudit.stats.sequential import Null
from locaudit.stats.verdict import MethodVerdict, NullResult


def sentence(v: MethodVerdict, facts: MethodFacts, score: str, level: float, n_questions: int) -> str:
    """The outcome of one method in words, with its numbers."""
    sign, need = SIGNS[v.supports], math.ceil(1 / level - 1e-9) - 1
    values: dict[str, Any] = {
        **facts.terms,
        "v": v, "score": score, "level": level, "n_questions": n_questions, "most_missing": MAX_MISSING,
        "least_p": 2.0**-n_questions, "need_questions": math.ceil(-math.log2(level)), "need": need,
        "Nothing": facts.terms["nothing"].capitalize(), "others": _others(v, facts), "r": _telling(v),
    }  # fmt: skip

    def part(name: str, is_said: bool = True, **more: Any) -> str:
        return say("sentence", name, **values | more) if is_said else ""

    def beaten(name: str, r: NullResult) -> str:
        low, high = sorted(sign * x for x in r.gap_interval)
        n_diverged = sum(map(math.isnan, r.controls))
        return part(
            "beaten",
            r=r,
            lost=part("lost", n_diverged > 0, n_diverged=n_diverged),
            ended=part("ended", r.ended_early, r=r),
            lead=part("lead", not math.isnan(r.gap), gap=sign * r.gap, gap_low=low, gap_high=high),
            too_few="" if r.can_test or len(v.nulls) == 1 else f"; {too_few(name, r.population, level)}",
        )

    if v.worst_missing > MAX_MISSING:
        return part("missing")
    if math.isnan(v.claim):
        return part("diverged")
    whole = v.whole_model
    outcome = "few questions" if v.outcome == "underpowered" and 2.0**-n_questions > level else v.outcome
    told = "; ".join(beaten(name, r) for name, r in v.nulls.items())
    return part(
        outcome,
        change=part("change"),
        whole=part("whole_diverged" if whole is not None and math.isnan(whole) else "whole", whole is not None),
        beaten=told + part("left_out", v.n_missing > 0),
        least=part("few", values["r"].n_used < need, least_control_p=1 / (1 + values["r"].n_used)),
        more=part(_lack(values["r"], need)),
    )


def changes(v: MethodVerdict) -> str:
    """How many questions the edit at the claim made worse and better, in words; empty if it has no score."""
    claim = v.changes.get("claim")
    if claim is None or not claim.n:
        return ""
    others = [c for place, c in v.changes.items() if place.startswith("control ") and c.n]
    means = {name: fmean(getattr(c, name) for c in others) if others else 0.0 for name in ("worse", "better")}
    return say("changes", "line", c=claim, controls=say("changes", "controls", **means) if others else "")


def too_few(name: str, population: int | None, level: float) -> str:
    """A clause about a null whose places are too few to test at the level; empty if there are enough."""
    if Null(0, population).can_test(level):
        return ""
    least = 1 / (1 + (population or 0))
    return say("nulls", "too_few", population=population, where=where(name), least=least, level=level)


def _telling(v: MethodVerdict) -> NullResult:
    """The null that the outcome rests on: the first one that is open, or that the claim does not stand out from."""
    state = "open" if v.outcome == "underpowered" else "not specific"
    return next((r for r in v.deciding.values() if r.state == state), v.first)


def _others(v: MethodVerdict, facts: MethodFacts) -> str:
    """What the claim stands out from: ``editing random locations of its size, and those in its layers``."""
    first, *more = [r.where for r in v.deciding.values() if r.state == "specific"] or [""]
    return facts.terms["others"] + first + "".join(f", and those{words}" for words in more)


def _lack(r: NullResult, need: int) -> str:
    """Name of the text in words.toml that says why the controls of an effective edit do not decide yet."""
    if r.n_used < r.n_planned:
        return "unfinished"
    if r.n_used >= need:  # ``anytime``: all planned controls are used, but the interval still contains the level
        return "unknown"
    return "more" if r.can_test else "no_more"


def headline(methods: Mapping[str, MethodVerdict], facts: Mapping[str, MethodFacts]) -> str:
    """The conclusion over all methods.

    It is the conclusion of the first trained method, or of the last method if none is trained. If other methods call
    the claim specific and this method does not, the headline names those first.
    """
    if not methods:
        return say("headline", "none")
    main = next((name for name in methods if facts[name].trained), list(methods)[-1])
    v = methods[main]
    terms = {**facts[main].terms, "others": _others(v, facts[main]), "r": _telling(v)}
    why = say("headline", v.outcome, **terms)
    if v.outcome in ("specific", "specific to its layers"):
        return why
    if v.outcome != "underpowered":
        others = [facts[name].title for name, other in methods.items() if name != main and other.outcome == "specific"]
        text = "against" if others else "no_evidence"
        return say("headline", text, **terms, v=v, why=why, others_named=" and ".join(others))
    lack = "missing" if v.worst_missing > MAX_MISSING else "diverged" if math.isnan(v.claim) else "few"
    return say("headline", "no_answer", **terms, lack=say("headline", lack))
