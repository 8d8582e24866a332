"""Early stopping: after each trial, compare the controls with the claim and decide whether more controls are needed.

The statistics are in `locaudit.stats.sequential.Monitor`, with one monitor per method and null. This file passes scores
to the monitors. A place (claim or control) counts once it is final (`locaudit.run.rounds`): all its strengths have been
run and judged, because only then can validation questions choose one of them, and the chosen one has all samples.

Methods are compared with each other at the same controls. So a control that runs for one method runs for all of them,
and the controls of a null end only once every method's test against that null has stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from locaudit.config import AuditConfig
from locaudit.records import DIRECTIONS, NO_METHOD, TrialRecord, TrialSpec
from locaudit.stats.phrases import where
from locaudit.stats.scores import tolerance
from locaudit.stats.selection import score_place
from locaudit.stats.sequential import LEAST, Monitor
from locaudit.store.manifest import Manifest


class Stopping:
    """One `Monitor` per method and null, updated with each place that is final (`locaudit.run.rounds`)."""

    def __init__(self, config: AuditConfig, manifest: Manifest, score: str):
        self._is_fixed, self._score = config.stopping == "fixed", score
        self._tie = tolerance(score, manifest.dtype)
        self._told: set[str] = set()  # nulls for which `is_news` was asked
        self._last: dict[str, int] = {}  # null -> largest number of a control that runs for some method
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

    def add(self, trials: Sequence[TrialRecord]) -> None:
        """Add all judged trials of a place."""
        spec, found = trials[0].spec, score_place(trials, self._score, self._tie)
        self.begin([spec])
        for (method, _), monitor in self._monitors.items():
            # Every method is compared with the unedited model; only its missing judgements matter.
            if spec.method in (NO_METHOD, method):
                monitor.add(spec.place, *found)

    def describe(self) -> str:
        """For each method whose claim is scored, the number of controls that do at least as well. Empty without one."""
        seen = {key: monitor.seen for key, monitor in self._monitors.items() if monitor.seen.n}
        counts = "; ".join(
            f"{method} {look.n_at_least} of {look.n}{where(null)}" for (method, null), look in seen.items()
        )
        return f"controls at least as good as the claim: {counts}" if counts else ""

    def begin(self, specs: Sequence[TrialSpec]) -> None:
        """Note that these trials run. Controls among them, and those before, then run for all methods."""
        for spec in specs:
            self._last[spec.null] = max(spec.control, self._last.get(spec.null, -1))

    def has_ended(self, spec: TrialSpec) -> bool:
        """Whether the trial is that of a control which could not change any method's answer for its null.

        Always False with ``stopping = fixed``, and for a control that runs for another method.
        """
        if spec.arm != "control" or self._is_fixed or spec.control <= self._last.get(spec.null, -1):
            return False
        return all(monitor.state != "open" for (_, null), monitor in self._monitors.items() if null == spec.null)

    def must_wait(self, spec: TrialSpec) -> bool:
        """Whether a control waits for the results of earlier ones, so that workers do not run many in vain.

        As many controls may run ahead as have been counted, and `LEAST` (docs/cluster.md, "Waves").
        """
        if spec.arm != "control" or self._is_fixed or spec.control <= self._last.get(spec.null, -1):
            return False
        n = min(monitor.seen.n for (_, null), monitor in self._monitors.items() if null == spec.null)
        return spec.control >= n + max(n, LEAST)

    def is_news(self, spec: TrialSpec) -> bool:
        """Whether this is the first call for the null: the early end of its controls is reported only once."""
        fresh = spec.null not in self._told
        self._told.add(spec.null)
        return fresh
