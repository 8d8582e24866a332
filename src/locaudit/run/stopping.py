"""How controls compare so far, and when they may end early: kept up to date with each trial that ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from locaudit.config import AuditConfig
from locaudit.records import NO_METHOD, Arm, TrialRecord
from locaudit.stats.scores import resolve_score
from locaudit.stats.selection import BASE, score_place
from locaudit.stats.sequential import Monitor
from locaudit.store.database import Store
from locaudit.store.manifest import Manifest
from locaudit.store.run import judged, read_judgements


class Stopping:
    """A `Monitor` a method, fed with each place whose trials have all ended and been judged."""

    def __init__(self, store: Store, config: AuditConfig, manifest: Manifest, before: Sequence[TrialRecord]):
        self._store, self._manifest = store, manifest
        self._is_fixed = config.stopping == "fixed"
        self._score = resolve_score(config.score, tuple(manifest.judges))
        self._told: set[str] = set()
        self._monitors = {
            name: Monitor(
                rule=config.stopping,
                n_planned=manifest.n_controls,
                level=config.level,
                population=manifest.population,
                supports=facts.supports,
            )
            for name, facts in manifest.methods.items()
        }
        self._waiting: dict[tuple[str, Arm, int], list[TrialRecord]] = defaultdict(list)
        self.add(before)

    def add(self, trials: Sequence[TrialRecord]) -> None:
        """Take note of trials that are stored and judged."""
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
            if spec.method == NO_METHOD:  # of the unedited model only missing judgements count, for every method
                for monitor in self._monitors.values():
                    monitor.add(BASE, *score_place(trials, self._score))
            elif len(trials) == self._manifest.methods[spec.method].n_strengths:
                self._monitors[spec.method].add((spec.arm, spec.control), *score_place(trials, self._score))

    def describe(self) -> str:
        """How many controls do at least as well as the claim so far, for each method whose claim is scored."""
        seen = {name: monitor.seen for name, monitor in self._monitors.items() if monitor.seen.n}
        counts = "; ".join(f"{name} {look.n_at_least} of {look.n}" for name, look in seen.items())
        return f"controls at least as good as the claim: {counts}" if counts else ""

    def has_ended(self, method: str) -> bool:
        """Whether the method's answer is clear."""
        return not self._is_fixed and self._monitors[method].state != "open"

    def is_news(self, method: str) -> bool:
        """Whether this is asked for the first time."""
        fresh = method not in self._told
        self._told.add(method)
        return fresh
