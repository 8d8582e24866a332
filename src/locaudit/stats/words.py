"""The sentences of a verdict, from the texts in words.toml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from locaudit.stats.phrases import MethodFacts, say
from locaudit.stats.scores import MAX_MISSING, SIGNS
from locaudit.stats.verdict import MethodVerdict


def sentence(v: MethodVerdict, facts: MethodFacts, score: str, level: float, n_questions: int) -> str:
    """The outcome of one method in words, with its numbers."""
    n_diverged, sign = sum(map(math.isnan, v.controls)), SIGNS[v.supports]
    low, high = sorted(sign * x for x in v.gap_interval)
    need = math.ceil(1 / level - 1e-9) - 1
    values: dict[str, Any] = {
        **facts.terms,
        "v": v, "score": score, "level": level, "n_questions": n_questions, "most_missing": MAX_MISSING,
        "n_diverged": n_diverged, "gap": sign * v.gap, "gap_low": low, "gap_high": high,
        "least_p": 2.0**-n_questions, "need_questions": math.ceil(-math.log2(level)),
        "need": need, "least_control_p": 1 / (1 + v.n_used),
        "Nothing": facts.terms["nothing"].capitalize(),
    }  # fmt: skip

    def part(name: str, is_said: bool = True, **more: str) -> str:
        return say("sentence", name, **values, **more) if is_said else ""

    if v.worst_missing > MAX_MISSING:
        return part("missing")
    if math.isnan(v.claim):
        return part("diverged")
    whole = v.whole_model
    beaten = part(
        "beaten",
        lost=part("lost", n_diverged > 0),
        ended=part("ended", v.ended_early),
        lead=part("lead", not math.isnan(v.gap)),
        left_out=part("left_out", v.n_missing > 0),
    )
    outcome = "few questions" if v.outcome == "underpowered" and 2.0**-n_questions > level else v.outcome
    return part(
        outcome,
        change=part("change"),
        whole=part("whole_diverged" if whole is not None and math.isnan(whole) else "whole", whole is not None),
        beaten=beaten,
        least=part("few", v.n_used < need),
        more=part(_lack(v, need)),
    )


def _lack(v: MethodVerdict, need: int) -> str:
    """Name of the text in words.toml that says why the controls of an effective edit do not decide yet."""
    if v.n_used < v.n_planned:
        return "unfinished"
    if v.n_used >= need:  # ``anytime``: all planned controls are used, but the interval still contains the level
        return "unknown"
    return "no_more" if v.population is not None and v.population < need else "more"


def headline(methods: Mapping[str, MethodVerdict], facts: Mapping[str, MethodFacts]) -> str:
    """The conclusion over all methods.

    It is the conclusion of the first trained method, or of the last method if none is trained. If other methods call
    the claim specific and this method does not, the headline names those first.
    """
    if not methods:
        return say("headline", "none")
    main = next((name for name in methods if facts[name].trained), list(methods)[-1])
    v, terms = methods[main], facts[main].terms
    why = say("headline", v.outcome, **terms)
    if v.outcome == "specific":
        return why
    if v.outcome != "underpowered":
        others = [facts[name].title for name, other in methods.items() if name != main and other.outcome == "specific"]
        text = "against" if others else "no_evidence"
        return say("headline", text, **terms, v=v, why=why, others_named=" and ".join(others))
    lack = "missing" if v.worst_missing > MAX_MISSING else "diverged" if math.isnan(v.claim) else "few"
    return say("headline", "no_answer", **terms, lack=say("headline", lack))
