"""Audits of models in which localization is a fact: whether they are right, and with what power."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from locaudit.config import AuditConfig, merge_config
from locaudit.location import Location
from locaudit.run.audit import run_audit
from locaudit.stats import Verdict, decide_run, judged_records, select
from locaudit.store import read_run
from locaudit.studies.calibration.planted import Planted, plant_model, planted_settings
from locaudit.studies.calibration.rates import chance_specific

FAMILY = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
"""Heads, of 48, that can do it, one model each."""
N_HEADS = 48
"""24 layers of 2."""


@dataclass(frozen=True)
class Case:
    """An audit of a model with a known answer."""

    name: str
    fact: str
    """What is true of the claim."""
    claim: str
    expected: str
    """Outcome that the fact asks for."""
    outcome: str
    uniqueness: str
    """Grade of that name."""
    p_value: float
    base: float
    claim_score: float
    control_scores: tuple[float, ...]


@dataclass(frozen=True)
class Strength:
    """One model of the family in which m heads can do it."""

    n_able: int
    claim: str
    claim_score: float
    n_at_least: int
    """Of the other heads, those whose edit does at least as well as the claim's."""
    power: float
    """Probability of `specific` over all draws of controls, from the measured scores."""
    theory: float
    """The same if exactly the other able heads reach the claim."""


def audit_cases(folder: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> list[Case]:
    """The four facts: one head can do it; the claim names a wrong one; all can; only one layer knows what is needed."""
    one = plant_model("misconception", 1, seed=seed)
    every = plant_model("misconception", N_HEADS, seed=seed)
    key = plant_model("key", 1, seed=seed)
    wrong = _first(one, elsewhere=True)
    cases = [
        ("right", one, one.places, "the only head that reaches the output", "specific"),
        ("wrong head", one, wrong, "a head that reaches nothing; another one could do it", "no effect"),
        ("anywhere", every, _first(every), "one of 48 heads that all can do it", "effective, not specific"),
        ("knows", key, _first(key), "one of the two heads of the only layer that has read the key", "specific"),
        ("can write, cannot know", key, _first(key, elsewhere=True), "a head that writes answers, without the key",
         "no effect"),
    ]  # fmt: skip
    out = []
    for name, planted, claim, fact, expected in cases:
        say(f"{name}: {fact}")
        verdict = _audit(planted, claim, folder / name.replace(", ", "-").replace(" ", "-"), seed)
        found = verdict.methods["optimal"]
        grades = {grade.question: grade.answer for grade in found.grades}
        out.append(
            Case(
                name,
                fact,
                str(claim),
                expected,
                found.outcome,
                grades["uniqueness"],
                found.p_value,
                found.base,
                found.claim,
                found.controls,
            )  # fmt: skip
        )
    return out


def power_curve(
    folder: Path,
    *,
    family: Sequence[int] = FAMILY,
    n_controls: int = 19,
    level: float = 0.05,
    seed: int = 0,
    say: Callable[[str], None] = print,
    n_layers: int = 24,
    n_items: int = 200,
) -> list[Strength]:
    """Audit a head that can do it, in models where more and more of the others can as well.

    A layer has 2 heads; smaller models are for tests.
    """
    out = []
    for n_able in family:
        planted = plant_model("misconception", n_able, seed=seed, n_layers=n_layers, n_items=n_items)
        say(f"{n_able} of {len(planted.model.whole())} heads can do it")
        claim = _first(planted)
        where = folder / f"able-{n_able:02d}"
        _audit(planted, claim, where, seed)
        with read_run(where) as store:
            records = judged_records(store)
        chosen = select(records, "preference_accuracy")["optimal"]
        scores = {place: np.nan if r is None else r.metrics["test"]["preference_accuracy"]
                  for place, r in chosen.items()}  # fmt: skip
        own = scores.pop(("claim", -1))
        others = [score for (arm, _), score in scores.items() if arm == "control"]
        n_at_least = sum(not score < own for score in others)
        out.append(
            Strength(
                n_able,
                str(claim),
                float(own),
                n_at_least,
                chance_specific(n_at_least, len(others), n_controls, level),
                chance_specific(n_able - 1, len(others), n_controls, level),
            )
        )
    return out


def _first(planted: Planted, *, elsewhere: bool = False) -> Location:
    """The first of the heads that can do it, or of the others."""
    units = (planted.elsewhere or planted.places).units if elsewhere else planted.places.units
    return Location(units[:1])


def _audit(planted: Planted, claim: Location, folder: Path, seed: int) -> Verdict:
    """An audit against all other heads; resumed if it was interrupted."""
    config = merge_config(
        AuditConfig(),
        {
            **planted_settings(),
            "model": planted.model.name,
            "behaviour": planted.behaviour.name,
            "claim": str(claim),
            "controls": len(planted.model.whole()) - 1,
            "whole_model": False,
            "seed": seed,
        },
    )
    run_audit(config, folder, model=planted.model, behaviour=planted.behaviour, progress=False)
    with read_run(folder) as store:
        return decide_run(store, judged_records(store))
