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

    It is optional stopping to add something because of the results. There are exceptions. Nulls, and the first placebo,
    can only make `specific` rarer. If `rule` was `anytime` from the first result on, p holds at any number of controls.
    And before the extension, the run may have been so small that no p could have been at most the level: with N
    controls the smallest p is 1 / (1 + N), and with n test questions the smallest p of the gain is 2^-n.
    """
    if not extensions:
        return ""
    grown = "; ".join(say("extended", "grown", e=e) for e in extensions)
    only_nulls = all(e.what == NULLS for e in extensions)
    # More placebos weaken each one's p (Bonferroni), so that only the first is harmless.
    extensions = [e for e in extensions if e.what != NULLS and (e.what, e.before) != (PLACEBOS, 0)]
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
    if extension.what in (CONTROLS, RESTS):
        return not curtailment(n, level)
    return extension.what == "test questions" and 2.0**-n > level
