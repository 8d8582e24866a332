"""Early stopping: after each trial, compare the controls with the claim and decide whether more controls are needed.

The statistics are in `locaudit.stats.sequential.Monitor`, with one monitor per method. This file passes scores to the
monitors. A place (claim or control) counts once all its strengths have been run and judged, because only then can
validation questions choose one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from locaudit.config import AuditConfig
from locaudit.records import NO_METHOD, Arm, TrialRecord
from locaudit.stats.scores import resolve_score, tolerance
from locaudit.stats.selection import BASE, score_place
from locaudit.stats.sequential import Monitor
from locaudit.store.database import Store
from locaudit.store.manifest import Manifest
from locaudit.store.run import judged, read_judgements


class Stopping:
    """One `Monitor` per method, updated with each place whose trials have all been stored and judged."""

    def __init__(self, store: Store, config: AuditConfig, manifest: Manifest, before: Sequence[TrialRecord]):
        self._store, self._manifest = store, manifest
        self._is_fixed = config.stopping == "fixed"
        self._score = resolve_score(config.score, tuple(manifest.judges))
        self._tie = tolerance(self._score, manifest.dtype)
        self._told: set[str] = set()  # methods for which `is_news` was asked
        self._monitors = {
            name: Monitor(
                rule=config.stopping,
                n_planned=manifest.n_controls,
                level=config.level,
                population=manifest.population,
                supports=facts.supports,
                tolerance=self._tie,
            )
            for name, facts in manifest.methods.items()
        }
        # (method, arm, control) -> its trials so far; it is complete when each strength has a trial
        self._waiting: dict[tuple[str, Arm, int], list[TrialRecord]] = defaultdict(list)
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
            trials = self._waiting[spec.method, spec.arm, spec.control]
            trials.append(record)
            if spec.method == NO_METHOD:  # the unedited model, used by every method; only missing judgements matter
                for monitor in self._monitors.values():
                    monitor.add(BASE, *score_place(trials, self._score, self._tie))
            elif len(trials) == self._manifest.methods[spec.method].n_strengths:
                self._monitors[spec.method].add((spec.arm, spec.control), *score_place(trials, self._score, self._tie))

    def describe(self) -> str:
        """For each method whose claim is scored, the number of controls that do at least as well. Empty without one."""
        seen = {name: monitor.seen for name, monitor in self._monitors.items() if monitor.seen.n}
        counts = "; ".join(f"{name} {look.n_at_least} of {look.n}" for name, look in seen.items())
        return f"controls at least as good as the claim: {counts}" if counts else ""

    def has_ended(self, method: str) -> bool:
        """Whether more controls could not change the method's answer; always False with ``stopping = fixed``."""
        return not self._is_fixed and self._monitors[method].state != "open"

    def is_news(self, method: str) -> bool:
        """Whether this is the first call for the method. So the early end of its controls is reported only once."""
        fresh = method not in self._told
        self._told.add(method)
        return fresh
