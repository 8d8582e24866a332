"""Early stopping: after each trial, compare the controls with the claim and decide whether more controls are needed.

`locaudit.stats.sequential.Monitor` has the statistics, one monitor per method. This file feeds them. A place (claim or
control) counts once it is final (`locaudit.run.rounds`): all its strengths have been run and judged, because only then
can validation choose one, and the chosen one has all samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from locaudit.config import AuditConfig
from locaudit.records import NO_METHOD, TrialRecord
from locaudit.stats.scores import tolerance
from locaudit.stats.selection import BASE, score_place
from locaudit.stats.sequential import Monitor
from locaudit.store.manifest import Manifest


class Stopping:
    """One `Monitor` per method, updated with each place that is final (`locaudit.run.rounds`)."""

    def __init__(self, config: AuditConfig, manifest: Manifest, score: str):
        self._is_fixed, self._score = config.stopping == "fixed", score
        self._tie = tolerance(score, manifest.dtype)
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

    def add(self, trials: Sequence[TrialRecord]) -> None:
        """Add all judged trials of a place."""
        spec, found = trials[0].spec, score_place(trials, self._score, self._tie)
        if spec.method == NO_METHOD:  # every method is compared with it; only its missing judgements matter
            for monitor in self._monitors.values():
                monitor.add(BASE, *found)
        else:
            self._monitors[spec.method].add((spec.arm, spec.control), *found)

    def describe(self) -> str:
        """For each method whose claim is scored, how many controls do at least as well; empty if there is none."""
        seen = {name: monitor.seen for name, monitor in self._monitors.items() if monitor.seen.n}
        counts = "; ".join(f"{name} {look.n_at_least} of {look.n}" for name, look in seen.items())
        return f"controls at least as good as the claim: {counts}" if counts else ""

    def has_ended(self, method: str) -> bool:
        """Whether more controls could not change the method's answer; always False with ``stopping = fixed``."""
        return not self._is_fixed and self._monitors[method].state != "open"

    def is_news(self, method: str) -> bool:
        """Whether this is the first call for the method, so that the end of its controls is reported once."""
        fresh = method not in self._told
        self._told.add(method)
        return fresh
