"""The verdict of a run folder, as its configuration and its facts say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from locaudit.records import Method, TrialRecord
from locaudit.stats.judged import judged_records, run_score
from locaudit.stats.measured import Design
from locaudit.stats.repeats import Repeat
from locaudit.stats.verdict import Verdict, decide
from locaudit.stats.words import MAX_MISSING
from locaudit.store import Store


def run_design(store: Store, records: Sequence[TrialRecord]) -> Design:
    """How a run's controls were planned, and what one of them took."""
    run, config = store.fact("run") or {}, store.config
    return Design(
        rule=config.stopping,
        n_planned=run.get("n_controls", config.controls),
        population=run.get("population"),
        margin=config.margin,
        matched=config.match != "none",
        seconds=_seconds_per_control(records, store.seconds()),
    )


def decide_run(store: Store, records: Sequence[TrialRecord], score: str | None = None) -> Verdict:
    """The verdict on a run's records (`locaudit.stats.judged_records`), by its own score or another."""
    return decide(records, score=score or run_score(store), level=store.config.level, design=run_design(store, records))


def read_repeat(store: Store) -> Repeat:
    """A run as one of several, without grades."""
    records = judged_records(store)
    verdict = decide(
        records,
        score=run_score(store),
        level=store.config.level,
        design=replace(run_design(store, records), graded=False),
    )
    places = {r.spec.control: r.spec.location for r in records if r.spec.arm == "control"}
    claim = (store.fact("run") or {}).get("claim") or verdict.claim
    questions = tuple(sorted(question.id for question in store.questions("test")))
    return Repeat(verdict, claim, tuple(location for _, location in sorted(places.items())), questions)


def ended_early(store: Store, method: Method) -> bool:
    """Whether a method's answer is clear from its claim and the controls of which every trial has its record."""
    grid = {"iti": store.config.iti.alphas, "optimal": store.config.optimal.strengths}.get(method, ())
    records = judged_records(store)
    counts = Counter((r.spec.method, r.spec.control) for r in records if r.spec.arm == "control")
    kept = [r for r in records if r.spec.arm != "control" or counts[method, r.spec.control] == len(grid)]
    kept = [r for r in kept if r.spec.method in ("none", method)]
    design = replace(run_design(store, records), graded=False)
    verdict = decide(kept, score=run_score(store), level=store.config.level, design=design).methods.get(method)
    if verdict is None or verdict.worst_missing > MAX_MISSING:
        return False
    lost = any(r.spec.arm == "claim" and r.status == "ok" for r in kept) and math.isnan(verdict.claim)
    return verdict.ended_early and not lost  # a claim that no judge judged is reached by nothing and everything


def _seconds_per_control(records: Sequence[TrialRecord], seconds: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = {}
    places: dict[str, set[int]] = {}
    for record in records:
        spec = record.spec
        if spec.arm == "control" and spec.trial_id in seconds:
            total[spec.method] = total.get(spec.method, 0.0) + seconds[spec.trial_id]
            places.setdefault(spec.method, set()).add(spec.control)
    return {method: total[method] / len(places[method]) for method in total}
