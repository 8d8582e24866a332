"""Audit planted models, whose localization is known, to measure whether the verdict is right and what its power is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from locaudit.config import AuditConfig, merge_config
from locaudit.location import Location
from locaudit.report.figures import new_figure
from locaudit.report.style import ARM_COLOURS, FAINT, house_style
from locaudit.run.audit import run_audit
from locaudit.stats.verdict import MethodVerdict
from locaudit.store.run import load_run
from locaudit.studies.calibration.planted import Planted, plant_model, planted_settings
from locaudit.studies.calibration.rates import FAMILY, N_HEADS, chance_specific

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Case:
    """The audit of a claim whose right answer is known."""

    name: str
    fact: str
    """What is true about the claim, by construction."""
    claim: str
    expected: str
    """The right outcome, given the fact."""
    outcome: str
    p_value: float
    base: float
    claim_score: float
    control_scores: tuple[float, ...]

    def __str__(self) -> str:
        mark = "right" if self.outcome == self.expected else "WRONG"
        return (
            f"{mark}: {self.name} ({self.fact}): {self.outcome}, p = {self.p_value:.3f}; {self.base:.3f} unedited, "
            f"{self.claim_score:.3f} at the claim, {min(self.control_scores):.3f} to {max(self.control_scores):.3f} at "
            f"{len(self.control_scores)} other heads"
        )


@dataclass(frozen=True)
class Strength:
    """The audit of one planted model, in which an edit can succeed at `n_able` heads (the able heads)."""

    n_able: int
    claim: str
    claim_score: float
    n_at_least: int
    """Number of other heads whose edit does at least as well as the claim's."""
    power: float
    """Probability of `specific` over all draws of controls, computed from the measured scores."""
    theory: float
    """The same probability if exactly the other able heads do as well as the claim."""

    def __str__(self) -> str:
        return (
            f"{self.n_able} able heads: claim {self.claim} scores {self.claim_score:.3f}, {self.n_at_least} "
            f"other heads at least as much; specific with probability {self.power:.3f} (theory {self.theory:.3f})"
        )


def audit_cases(folder: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> list[Case]:
    """Audit five claims whose right answer is known by construction.

    Each audit is a run folder in `folder` and resumes if it was interrupted. `say` receives progress messages.
    """
    one = plant_model("misconception", 1, seed=seed)
    every = plant_model("misconception", N_HEADS, seed=seed)
    key = plant_model("key", 1, seed=seed)
    elsewhere, without_key = _first(one.elsewhere), _first(key.elsewhere)
    cases = [
        ("right", one, one.places, "the only head wired to the output", "SPECIFIC"),
        ("wrong head", one, elsewhere, "a head not wired to the output; another one is", "NO GAIN SHOWN"),
        ("anywhere", every, _first(every.places), "one of 48 heads wired to the output", "NOT SPECIFIC"),
        ("knows", key, _first(key.places), "one of two heads in the only layer that reads the key", "SPECIFIC"),
        ("can write, cannot know", key, without_key, "a head that writes answers but lacks the key", "NO GAIN SHOWN"),
    ]
    out = []
    for name, planted, claim, fact, expected in cases:
        say(f"{name}: {fact}")
        v = _audit(planted, claim, folder / name.replace(", ", "-").replace(" ", "-"), seed)
        found = (v.outcome, v.first.p_value, v.base, v.claim, v.first.controls)
        out.append(Case(name, fact, str(claim), expected, *found))
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
    """Power of the specificity test, measured in models with more and more able heads. The claim is one of these.

    An edit can succeed exactly at the able heads. `family` lists the number of able heads of each model. Layers have 2
    heads. For tests, `n_layers` and `n_items` make the models smaller.
    """
    out = []
    for n_able in family:
        planted = plant_model("misconception", n_able, seed=seed, n_layers=n_layers, n_items=n_items)
        say(f"an edit can succeed at {n_able} of {planted.n_heads} heads")
        claim = _first(planted.places)
        v = _audit(planted, claim, folder / f"able-{n_able:02d}", seed)
        controls = v.first.controls
        n_at_least = sum(not score < v.claim for score in controls)  # a control that diverged counts
        power, theory = (chance_specific(n, len(controls), n_controls, level) for n in (n_at_least, n_able - 1))
        out.append(Strength(n_able, str(claim), v.claim, n_at_least, power, theory))
    return out


def _first(location: Location | None) -> Location:
    """The first head of a location, as a location."""
    assert location is not None
    return Location(location.units[:1])


def _audit(planted: Planted, claim: Location, folder: Path, seed: int) -> MethodVerdict:
    """Audit `claim` by optimal edits, with all other heads as controls. An interrupted audit is resumed."""
    settings = {
        **planted_settings(),
        "model": planted.model.name,
        "behaviour": planted.behaviour.name,
        "claim": str(claim),
        "controls": planted.n_heads - 1,
        "nulls": ["anywhere"],
        "whole_model": False,
        "placebos": 0,
        "seed": seed,
    }
    config = merge_config(AuditConfig(), settings)
    run_audit(config, folder, model=planted.model, behaviour=planted.behaviour, progress=False)
    return load_run(folder).verdict.methods["optimal"]


def draw_power(n_able: Sequence[int], power: Sequence[float], *, n_heads: int, n_controls: int, level: float) -> Figure:
    """Plot power against the share of other heads that are able. Measured values are points, theory is a line."""
    every = np.arange(1, n_heads + 1)
    predicted = [chance_specific(int(m) - 1, n_heads - 1, n_controls, level) for m in every]
    theory = f"theory: an edit succeeds at none of {n_controls} random heads"
    share = "share of the other heads at which an edit can succeed too"
    with house_style():
        figure = new_figure(3.6)
        axis = figure.subplots()
        axis.plot((every - 1) / (n_heads - 1), predicted, color=FAINT, linewidth=1.2, zorder=1, label=theory)
        points = {"color": ARM_COLOURS["claim"], "s": 34, "zorder": 3, "label": "trained edits of planted models"}
        axis.scatter((np.asarray(n_able) - 1) / (n_heads - 1), power, **points)
        axis.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        axis.set(xlabel=share, ylabel="probability of the verdict “specific”", ylim=(-0.03, 1.03))
        axis.legend()
    return figure
