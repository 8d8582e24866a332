"""The verdict's sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from locaudit.stats.verdict import MethodVerdict

MAX_MISSING = 0.05
"""Share of an arm's judgements that may be missing."""


def sentence(v: MethodVerdict, score: str, level: float, n_questions: int) -> str:
    """The outcome of a method in words that cannot be misread."""
    n = v.n_used
    low, high = v.effect_interval
    if v.worst_missing > MAX_MISSING:
        return (
            f"Too many judgements are missing ({v.n_missing} of {v.n_judged}; in one arm {v.worst_missing:.0%}, above "
            f"{MAX_MISSING:.0%}): answers that a judge fails on are no random sample, so nothing is concluded. Run the "
            "same command again to judge them."
        )
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
    if v.ended_early:
        beaten += f" (they ended early: {v.n_planned} were planned)"
    if not math.isnan(v.gap):
        beaten += (
            f", the claim's lead over their mean is {v.gap:+.3f} ({v.gap_interval[0]:+.3f} to {v.gap_interval[1]:+.3f})"
        )
    if v.n_missing:
        beaten += f"; {v.n_missing} of {v.n_judged} judged answers are missing and left out"
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
        more = f"Use at least {need} controls, in a new run folder."
        if v.population is not None and v.population < need:
            more = f"There are only {v.population} such places, {need} would be needed: match less strictly."
        if n < v.n_planned:
            more = f"{n} of {v.n_planned} planned are scored: run the same command again."
        elif n >= need:  # controls that end when an interval excludes the level, and it has not
            more = f"Their share that does as well is not known to lie on one side of {level:g}: use more of them."
        least = f" (the smallest possible p is {1 / (1 + n):.3f}, above {level:g})" if n < need else ""
        return (
            f"Editing the claim works: {change}.{whole} But {n} controls cannot decide if the place matters{least}."
            f" {more} So far {beaten}."
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


def headline(methods: Mapping[str, MethodVerdict]) -> str:
    """What a reader should take away, over all methods."""
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
    lack = "too many judgements are missing" if main.worst_missing > MAX_MISSING else lack
    return f"{subject} no answer yet: {lack}."
