"""What it means for p if a run was extended after results existed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locaudit.stats.phrases import say
from locaudit.stats.sequential import Rule, curtailment

CONTROLS, NULLS, RESTS, PLACEBOS = "controls", "nulls", "rests of controls", "placebos"


@dataclass(frozen=True)
class Extension:
    """Something that was added to a run after it had results."""

    what: str
    """``controls``, ``test questions``, ``judges`` and the like."""
    before: int | str
    after: int | str
    n_trials: int
    """Number of trials that had results by then."""
    n_planned: int
    """Number of trials that were planned then."""


def describe_extensions(extensions: Sequence[Extension], rule: Rule, level: float) -> str:
    """What was added, and whether p still holds at its level. Empty if nothing was added.

    It is optional stopping to add something because of the results. There are two exceptions. With `anytime`, p holds
    at any number of controls. And before the extension, the run may have been so small that no p could have been at
    most the level: with N controls the smallest p is 1 / (1 + N), and with n test questions the smallest p of the gain
    is 2^-n.
    """
    if not extensions:
        return ""
    grown = "; ".join(say("extended", "grown", e=e) for e in extensions)
    # One more null, or a placebo that gains, can only make `specific` rarer; rests of controls do not enter it.
    only_nulls = all(e.what == NULLS for e in extensions)
    extensions = [e for e in extensions if e.what not in (NULLS, RESTS, PLACEBOS)]
    controls = [e.before for e in extensions if e.what == CONTROLS and isinstance(e.before, int)]
    meaning = say("extended", "stopping", level=level)
    if not extensions:
        meaning = say("extended", "nulls" if only_nulls else "beside")
    elif len(controls) == len(extensions) and rule == "anytime":
        meaning = say("extended", "anytime")
    elif all(_was_powerless(e, level) for e in extensions):
        meaning = say("extended", "powerless")
    elif controls and rule != "anytime":
        meaning += say("extended", "hint")
    return say("extended", "sentence", grown=grown, meaning=meaning)


def _was_powerless(extension: Extension, level: float) -> bool:
    """Whether no result could have been significant before the extension."""
    n = extension.before
    if not isinstance(n, int):
        return False
    return {CONTROLS: not curtailment(n, level), "test questions": 2.0**-n > level}.get(extension.what, False)
