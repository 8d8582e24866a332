"""Flags of a method's edits: signs that a better edit exists than the one found.

Placebos have none but the last, since they are not meant to be good.

edge            the best strength at a place is the smallest or largest of those tried there
single          a method that has a strength was tried with only one
not optimised   a trained edit is worse than an untrained one (ITI) at the same place by more than the margin, a share
                of what that one gains: on validation questions, or on test questions if a method was not validated
                because it has one strength
superset        the whole model's training objective is worse than that of a place that it contains
unsettled       from the last window of training steps but one to the last, the loss rose by more than `MOST_RISE` of
                the unedited model's
short           the longest training that ``epochs: auto`` tries still gained
destroyed       the edit's KL drift is above `MOST_KL`, or most of its answers are degenerate (`find_destroyed`)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from locaudit.records import NO_METHOD, Place, TrialRecord
from locaudit.stats.degenerate import share_degenerate
from locaudit.stats.phrases import MethodFacts, say
from locaudit.stats.scores import TIE
from locaudit.stats.selection import CLAIM, WHOLE, choose, group_trials, is_at_edge, select

LEAST_LOSS = 0.02
"""Relative difference between two training objectives that counts."""
MOST_RISE = 0.1
"""Rise of the loss at the end of training, as a share of the unedited model's, that counts (``change`` of
`locaudit.methods.training.progress`)."""
MOST_KL = 2.0
"""KL of the unedited model to the edited one on the drift text, in nats per token, above which an edit destroys it."""
MOST_DEGENERATE = 0.5
"""Share of degenerate answers to test questions above which an edit destroys the model."""


@dataclass(frozen=True)
class Flag:
    """A sign that a better edit exists than the one found."""

    name: str
    places: tuple[str, ...]
    """The places it is about, such as ``claim`` or ``control anywhere 3``."""
    text: str


def find_flags(
    records: Iterable[TrialRecord],
    facts: Mapping[str, MethodFacts],
    score: str,
    tolerance: float = TIE,
    margin: float = 0.0,
) -> dict[str, tuple[Flag, ...]]:
    """Method -> the flags of its edits, by the means of a score. `margin` is the share of a gain that counts as none.

    Where test questions are read, nothing is chosen by them: a flag can only turn a "no" into open.
    """
    records = list(records)
    trials = {name: places for name, places in group_trials(records).items() if name != NO_METHOD}
    base = next((record for record in records if record.spec.arm == "base"), None)
    best = {name: {p: choose(tried, score, tolerance) for p, tried in x.items()} for name, x in trials.items()}
    # The untrained methods that edit the same places for the same purpose.
    rivals = [r for r in trials if (facts[r].trained, facts[r].supports, facts[r].null) == (False, "higher", "places")]

    def compared(place: Place, *names: str) -> tuple[str, tuple[float, ...]]:
        found = [*(best[name].get(place) for name in names), base]
        scores = {
            split: tuple(math.nan if x is None else x.metrics.get(split, {}).get(score, math.nan) for x in found)
            for split in ("val", "test")
        }
        split = "test" if any(map(math.isnan, scores["val"][:-1])) else "val"
        return {"val": "validation", "test": "test"}[split], scores[split]

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
        if own.symbol and own.n_strengths == 1 and (chosen := best[name].get(CLAIM)):
            yield from flag("single", [CLAIM], strength=chosen.spec.hyperparameter)
        if not own.trained:
            return
        for rival in rivals if own.supports == "higher" else ():
            for place in (CLAIM, WHOLE):
                questions, (ours, theirs, unedited) = compared(place, name, rival)
                none = max(tolerance, 0.0 if math.isnan(unedited) else margin * (theirs - unedited))
                worse = [place] if ours < theirs - none else []
                said = {"ours": ours, "theirs": theirs, "rival": facts[rival].title, "questions": questions}
                yield from flag("not optimised", worse, **said)
        whole = {record.spec.hyperparameter: record for record in places.get(WHOLE, ())}
        yield from flag("superset", [p for p in places if p != WHOLE and _falls_short(best[name][p], whole)])
        ended = {place: chosen for place in places if (chosen := best[name][place])}
        yield from flag("unsettled", [p for p, x in ended.items() if x.training.get("change", (0.0,))[0] > MOST_RISE])
        if not training.get("plateau", True):
            yield from flag("short", [CLAIM], epochs=training["epochs"])

    return {name: tuple(find(name)) for name in trials}


def find_destroyed(
    records: Sequence[TrialRecord], questions: Sequence[str], score: str, tolerance: float = TIE
) -> dict[str, tuple[Flag, ...]]:
    """Method -> the flag of those chosen edits that destroy the model: what they score is no evidence for their places.

    `questions` has the texts of the test questions; without them, only KL counts. Degenerate answers
    (`share_degenerate`) do not count if most answers of the unedited model are degenerate.
    """

    def broken(record: TrialRecord) -> float:
        return (share_degenerate(record, questions) or 0.0) if questions else 0.0

    base = next((record for record in records if record.spec.arm == "base" and record.status == "ok"), None)
    is_fit = base is not None and broken(base) <= MOST_DEGENERATE
    flags = {}
    for name, tried in select(records, score, tolerance).items():
        why: dict[Place, str] = {}
        for place, record in tried.items():
            if record is None or name == NO_METHOD:
                continue
            kl, share = record.drift.get("kl", 0.0), broken(record) if is_fit else 0.0
            signs = [f"KL {kl:.1f} nats per token"] if kl > MOST_KL else []
            signs += [f"{share:.0%} of its answers are degenerate"] if share > MOST_DEGENERATE else []
            if signs:
                why[place] = " and ".join(signs)
        flags[name] = tuple(_flag("destroyed", list(why), why))
    return flags


def _falls_short(part: TrialRecord | None, whole: Mapping[float | None, TrialRecord]) -> bool:
    """Whether the whole model's objective is worse than that of a part of the model, at the part's strength."""
    record = whole.get(part.spec.hyperparameter) if part else None
    if part is None or record is None:
        return False
    theirs, ours = (r.training.get("objective", (math.nan,))[0] for r in (part, record))
    return ours - theirs > LEAST_LOSS * abs(theirs)


def _flag(kind: str, places: Sequence[Place], why: Mapping[Place, str] | None = None, **values: object) -> list[Flag]:
    """The flag about these places, or none if there are none. `why` is said of places without a number."""
    named = [
        say("flag", f"place.{place.arm}") + (f" ({why[place]})" if why else "") for place in places if place.control < 0
    ]
    many = {"control": "{} controls", "rest": "the rests of {} controls", "placebo": "{} placebos"}
    for arm, several in many.items():
        found = [place.label for place in places if place.arm == arm and place.control >= 0]
        named += [several.format(len(found))] if len(found) > 1 else found
    text = say("flag", kind, places=", ".join(named), **values)
    return [Flag(kind, tuple(place.label for place in places), text)] if places else []
