"""Flags of a method's edits: signs that a better edit exists than the one found. They do not change the verdict.

Placebos have none, since they are not meant to be good.

edge            the best strength at a place is the smallest or largest of those tried there
not optimised   a trained edit is worse on validation questions than an untrained one (ITI) at the same place
superset        the whole model's training objective is worse than that of a place that it contains
short           the longest training that ``epochs: auto`` tries still gained
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from locaudit.records import NO_METHOD, Place, TrialRecord
from locaudit.stats.phrases import MethodFacts, say
from locaudit.stats.scores import TIE
from locaudit.stats.selection import CLAIM, WHOLE, choose, group_trials, is_at_edge

LEAST_LOSS = 0.02
"""Relative difference between two training objectives that counts."""


@dataclass(frozen=True)
class Flag:
    """A sign that a better edit exists than the one found."""

    name: str
    places: tuple[str, ...]
    """The places it is about, such as ``claim`` or ``control anywhere 3``."""
    text: str


def find_flags(
    records: Iterable[TrialRecord], facts: Mapping[str, MethodFacts], score: str, tolerance: float = TIE
) -> dict[str, tuple[Flag, ...]]:
    """Method -> the flags of its edits. Scores are compared by their means on validation questions."""
    trials = {name: places for name, places in group_trials(records).items() if name != NO_METHOD}
    best = {name: {p: choose(tried, score, tolerance) for p, tried in x.items()} for name, x in trials.items()}
    # The untrained methods that edit the same places for the same purpose.
    rivals = [r for r in trials if (facts[r].trained, facts[r].supports, facts[r].null) == (False, "higher", "places")]

    def validated(name: str, place: Place) -> float:
        record = best[name].get(place)
        return math.nan if record is None else record.metrics.get("val", {}).get(score, math.nan)

    def find(name: str) -> Iterator[Flag]:
        own, training = facts[name], facts[name].training or {}
        places = {place: tried for place, tried in trials[name].items() if place.arm != "placebo"}
        flag = partial(_flag, title=own.title, symbol=own.symbol)
        edge = [
            place
            for place, tried in places.items()
            if (chosen := best[name][place])
            and is_at_edge((x.spec.hyperparameter for x in tried), chosen.spec.hyperparameter)
        ]
        yield from flag("edge", edge)
        if not own.trained:
            return
        for rival in rivals if own.supports == "higher" else ():
            for place in (CLAIM, WHOLE):
                ours, theirs = validated(name, place), validated(rival, place)
                worse = [place] if ours < theirs - tolerance else []
                yield from flag("not optimised", worse, ours=ours, theirs=theirs, rival=facts[rival].title)
        whole = {record.spec.hyperparameter: record for record in places.get(WHOLE, ())}
        yield from flag("superset", [p for p in places if p != WHOLE and _falls_short(best[name][p], whole)])
        if not training.get("plateau", True):
            yield from flag("short", [CLAIM], epochs=training["epochs"])

    return {name: tuple(find(name)) for name in trials}


def _falls_short(part: TrialRecord | None, whole: Mapping[float | None, TrialRecord]) -> bool:
    """Whether the whole model's objective is worse than that of a part of the model, at the part's strength."""
    record = whole.get(part.spec.hyperparameter) if part else None
    if part is None or record is None:
        return False
    theirs, ours = (r.training.get("objective", (math.nan,))[0] for r in (part, record))
    return ours - theirs > LEAST_LOSS * abs(theirs)


def _flag(kind: str, places: Sequence[Place], **values: object) -> list[Flag]:
    """The flag about these places, or none if there are none."""
    named = [say("flag", f"place.{place.arm}") for place in places if place.control < 0]
    for arm, several in (("control", "{} controls"), ("rest", "the rests of {} controls")):
        found = [place.label for place in places if place.arm == arm and place.control >= 0]
        named += [several.format(len(found))] if len(found) > 1 else found
    text = say("flag", kind, places=", ".join(named), **values)
    return [Flag(kind, tuple(place.label for place in places), text)] if places else []
