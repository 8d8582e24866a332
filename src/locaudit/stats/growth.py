"""What it means for p that a run was extended after results existed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from locaudit.stats.phrases import say
from locaudit.stats.sequential import Rule, curtailment

CONTROLS = "controls"


@dataclass(frozen=True)
class Extension:
    """Something that was added to a run after it had results."""

    what: str
    """``controls``, ``test questions``, ``judges`` and the like."""
    before: int | str
    after: int | str
    n_trials: int
    """Trials that had results by then."""
    n_planned: int
    """Of how many."""


def describe_extensions(extensions: Sequence[Extension], rule: Rule, level: float) -> str:
    """What was added, and whether p still holds at its level; empty for nothing.

    To add anything because of what was seen is optional stopping. Two cases are not: `anytime`, whose p holds at any
    number of controls, and adding to so little that no p could have been at most the level: with N controls the
    smallest p is 1 / (1 + N), with n test questions the smallest p of the gain is 2^-n.
    """
    if not extensions:
        return ""
    grown = "; ".join(say("extended", "grown", e=e) for e in extensions)
    controls = [e.before for e in extensions if e.what == CONTROLS and isinstance(e.before, int)]
    meaning = say("extended", "stopping", level=level)
    if len(controls) == len(extensions) and rule == "anytime":
        meaning = say("extended", "anytime")
    elif all(_was_powerless(e, level) for e in extensions):
        meaning = say("extended", "powerless")
    elif controls and rule != "anytime":
        meaning += say("extended", "hint")
    return say("extended", "sentence", grown=grown, meaning=meaning)


def _was_powerless(extension: Extension, level: float) -> bool:
    """Whether no result could have been significant before."""
    n = extension.before
    if not isinstance(n, int):
        return False
    return {CONTROLS: not curtailment(n, level), "test questions": 2.0**-n > level}.get(extension.what, False)
