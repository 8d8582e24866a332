"""Early stopping: after each trial, compare the controls with the claim and decide whether more controls are needed.

The statistics are in `locaudit.stats.sequential.Monitor`, with one monitor per method and null. This file passes scores
to the monitors. A place (claim or control) counts once all its strengths have been run and judged, because only then
can validation questions choose one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from locaudit.config import AuditConfig
from locaudit.records import DIRECTIONS, NO_METHOD, Place, TrialRecord, TrialSpec
from locaudit.stats.phrases import where
from locaudit.stats.scores import resolve_score, tolerance
from locaudit.stats.selection import score_place
from locaudit.stats.sequential import Monitor
from locaudit.store.database import Store
from locaudit.store.manifest import Manifest
from locaudit.store.run import judged, read_judgements


class Stopping:
    """One `Monitor` per method and null, updated with each place whose trials have all been stored and judged."""

    def __init__(self, store: Store, config: AuditConfig, manifest: Manifest, before: Sequence[TrialRecord]):
        self._store, self._manifest = store, manifest
        self._is_fixed = config.stopping == "fixed"
        self._score = resolve_score(config.score, tuple(manifest.judges))
        self._tie = tolerance(self._score, manifest.dtype)
        self._told: set[tuple[str, str]] = set()  # methods and nulls for which `is_news` was asked
        self._monitors = {
            (method, null): Monitor(
                rule=config.stopping,
                n_planned=planned.n_planned,
                level=config.level,
                population=planned.population,
                supports=facts.supports,
                tolerance=self._tie,
                null=null,
            )
            for method, facts in manifest.methods.items()
            for null, planned in manifest.nulls.items()
            if (null == DIRECTIONS) == (facts.null == DIRECTIONS)
        }
        # (method, place) -> its trials so far; it is complete when each strength has a trial
        self._waiting: dict[tuple[str, Place], list[TrialRecord]] = defaultdict(list)
        self.add(before)  # a resumed run starts with its earlier trials

    def add(self, trials: Sequence[TrialRecord]) -> None:
        """Add trials that have been stored and judged."""
        questions = {split: tuple(self._store.questions(split)) for split in ("val", "test")}
        answers = {
            (question.id, answer)
            for record in trials
            for split, said in record.answers.items()
            for question, answer in zip(questions[split], said, strict=True)
        }
        said = read_judgements(self._store, self._manifest.judges, answers)
        for record in judged(list(trials), said, questions):
            spec = record.spec
            trials = self._waiting[spec.method, spec.place]
            trials.append(record)
            is_base = spec.method == NO_METHOD  # used by every method; only missing judgements matter
            if is_base or len(trials) == self._manifest.methods[spec.method].n_strengths:
                found = score_place(trials, self._score, self._tie)
                for (method, _), monitor in self._monitors.items():
                    if is_base or method == spec.method:
                        monitor.add(spec.place, *found)

    def describe(self) -> str:
        """For each method whose claim is scored, the number of controls that do at least as well. Empty without one."""
        seen = {key: monitor.seen for key, monitor in self._monitors.items() if monitor.seen.n}
        counts = "; ".join(
            f"{method} {look.n_at_least} of {look.n}{where(null)}" for (method, null), look in seen.items()
        )
        return f"controls at least as good as the claim: {counts}" if counts else ""

    def has_ended(self, spec: TrialSpec) -> bool:
        """Whether the trial is that of a control which could not change the method's answer for its null.

        Always False with ``stopping = fixed``.
        """
        key = spec.method, spec.null
        return spec.arm == "control" and not self._is_fixed and self._monitors[key].state != "open"

    def is_news(self, spec: TrialSpec) -> bool:
        """Whether this is the first call for the method and null: the early end of controls is reported only once."""
        key = spec.method, spec.null
        fresh = key not in self._told
        self._told.add(key)
        return fresh
