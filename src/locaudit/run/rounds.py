"""Work that follows from results: further strengths, and more samples.

Once the planned trials of a place are done, its grid widens if need be, and then its chosen trial gets more samples.
The plan (`build_plan`) has what can be planned without results. The rest follows from *rules*: functions of the judged
trials of one place that return the trials to run next, if any. `RULES` are asked in order, and the first that returns
something decides. Once its trials are done, the rules are asked again. A place is **final** when its planned trials are
done and no rule returns anything. Only then does it count for early stopping.

A rule may return new trials, or ``replace(spec, measured=record)``: a trial that only gets more samples. What follows
from the last planned group of a place runs right after that group, so that a resumed run forms the same banks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from locaudit.config import AuditConfig
from locaudit.records import NO_METHOD, Place, TrialRecord, TrialSpec
from locaudit.registry import METHODS
from locaudit.run.plan import Groups
from locaudit.run.subject import Inputs
from locaudit.stats.scores import resolve_score, tolerance
from locaudit.stats.selection import choose, widened
from locaudit.store.database import Store, said_in
from locaudit.store.manifest import Manifest
from locaudit.store.run import judged, read_judgements

Where = tuple[str, Place]
"""(method, place)."""


@dataclass(frozen=True)
class Reading:
    """How rules read results."""

    config: AuditConfig
    score: str
    """The verdict's score."""
    tie: float
    """Scores that differ by less are ties."""


Rule = Callable[[Reading, Sequence[TrialRecord]], list[TrialSpec]]


def sample_more(reading: Reading, trials: Sequence[TrialRecord]) -> list[TrialSpec]:
    """The trial that validation chooses, if it has fewer sampled answers to the test questions than are wanted."""
    chosen = choose(trials, reading.score, reading.tie)
    if chosen is None or not chosen.answers:
        return []
    lacks = len(chosen.samples.get("test", ())) < reading.config.evaluation.samples
    return [replace(chosen.spec, measured=chosen)] if lacks else []


def widen(reading: Reading, trials: Sequence[TrialRecord]) -> list[TrialSpec]:
    """A trial with a further strength, if the best one is at the edge of those tried (`next_strength`)."""
    spec = trials[0].spec
    if spec.method == NO_METHOD:
        return []
    n_grid = len(METHODS[spec.method].strengths(reading.config.methods[spec.method]))
    further = widened(trials, reading.score, reading.tie, n_grid, reading.config.widen)
    return [] if further is None else [replace(spec, hyperparameter=further, measured=None)]


RULES: tuple[Rule, ...] = (widen, sample_more)
"""What can follow from the results of a place, in the order in which it is asked."""


class Rounds:
    """Follows the places of an audit from their planned trials until they are final."""

    def __init__(self, store: Store, inputs: Inputs, manifest: Manifest, plan: Groups):
        score = resolve_score(inputs.config.score, tuple(manifest.judges))
        self.reading = Reading(inputs.config, score, tolerance(score, manifest.dtype))
        self._store, self._judges = store, manifest.judges
        self._are_asked = inputs.judges.keys() >= manifest.judges.keys()
        """Whether all judges are asked; in a dry run those that cost money are not, so nothing can be chosen."""
        self._planned: dict[Where, list[TrialSpec]] = defaultdict(list)
        self._last: dict[Where, int] = {}
        """Number of the last planned group with a trial of the place."""
        for number, group in enumerate(plan):
            for spec in group:
                self._planned[_where(spec)].append(spec)
                self._last[_where(spec)] = number
        self.done: set[tuple[str, Place]] = set()
        """(trial id, place) of each trial that has a record."""
        self._found: dict[str, tuple[TrialRecord, TrialRecord]] = {}
        """Trial id -> (record with judged scores, record as the database stores it). Two nulls may share a trial."""
        self._specs: dict[Where, dict[str, TrialSpec]] = defaultdict(dict)
        """Place -> trial id -> trial, of those that have a record."""
        self._final: set[Where] = set()
        self._returned: set[tuple[str, Place | None]] = set()

    def find(self, trial: str) -> TrialRecord | None:
        """The record of the trial with this id, perhaps at another place; None if there is none yet."""
        return self._found[trial][1] if trial in self._found else None

    def add(self, records: Sequence[TrialRecord]) -> Iterator[Sequence[TrialRecord]]:
        """Add trials that have been stored and judged. Yields the judged trials of each place that is final now."""
        questions = {split: tuple(self._store.questions(split)) for split in ("val", "test")}
        said = read_judgements(self._store, self._judges, set(said_in(records, questions)))
        for found, record in zip(judged(list(records), said, questions), records, strict=True):
            spec = replace(record.spec, measured=None)
            self._found[spec.trial_id] = found, record
            self._specs[_where(spec)][spec.trial_id] = spec
            self.done.add((spec.trial_id, spec.place))
        ids = {record.spec.trial_id for record in records}
        for where in [where for where, specs in self._specs.items() if ids & specs.keys()]:
            if where not in self._final and self._is_planned_done(where) and not self._next(where):
                self._final.add(where)
                yield self._judged_trials(where)

    def follow(self, group: int) -> list[TrialSpec]:
        """What follows from the places whose plan ends with this group, except what was returned before."""
        if not self._are_asked:
            return []
        found = [
            spec
            for where, last in self._last.items()
            if group == last and where not in self._final and self._is_planned_done(where)
            for spec in self._next(where)
            if _key(spec) not in self._returned
        ]
        self._returned |= set(map(_key, found))
        return found

    def expected(self, group: int | None = None) -> list[TrialSpec]:
        """For each place that is not final and whose plan ends with this group (None: any), the trials that may follow.

        They are as many as can follow at most.
        """
        evaluation, found = self.reading.config.evaluation, []
        for where, planned in self._planned.items():
            if where in self._final or group not in (None, self._last[where]):
                continue
            if len(planned) > 1:  # a grid
                n_left = self.reading.config.widen - max(len(self._specs[where]) - len(planned), 0)
                found += [replace(planned[0], hyperparameter=None)] * n_left
            if evaluation.max_new_tokens and evaluation.samples > 1:
                found.append(replace(planned[0], measured=TrialRecord(planned[0], "ok", samples={"test": ((),)})))
        return found

    def _is_planned_done(self, where: Where) -> bool:
        return all(spec.trial_id in self._specs[where] for spec in self._planned[where])

    def _judged_trials(self, where: Where) -> list[TrialRecord]:
        return [replace(self._found[trial][0], spec=spec) for trial, spec in self._specs[where].items()]

    def _next(self, where: Where) -> list[TrialSpec]:
        trials = self._judged_trials(where)
        for rule in RULES:
            if found := rule(self.reading, trials):
                return [spec if spec.measured is None else self._without_judgements(spec) for spec in found]
        return []

    def _without_judgements(self, spec: TrialSpec) -> TrialSpec:
        stored = replace(self._found[spec.trial_id][1], spec=replace(spec, measured=None))
        return replace(spec, measured=stored)


def _key(spec: TrialSpec) -> tuple[str, Place | None]:
    """Further samples are wanted once for all places of a trial; a new trial is stored for each of its places."""
    return spec.trial_id, spec.place if spec.measured is None else None


def _where(spec: TrialSpec) -> Where:
    return spec.method, spec.place
