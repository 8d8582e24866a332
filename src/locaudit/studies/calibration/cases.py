"""Audit planted models, whose localization is known, to measure whether the verdict is right and what its power is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from locaudit.config import AuditConfig, merge_config
from locaudit.location import Location
from locaudit.report.charts import Series, line_trace, scatter_chart
from locaudit.report.figures import draw
from locaudit.report.style import ARM_COLOURS
from locaudit.run.audit import run_audit
from locaudit.stats.phrases import where
from locaudit.stats.questions import Outcome
from locaudit.stats.verdict import MethodVerdict
from locaudit.store.run import load_run
from locaudit.studies.calibration.planted import LAYER_HEADS, Planted, plant_model, planted_settings
from locaudit.studies.calibration.rates import FAMILY, chance_specific

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SPECIFIC: Outcome = "SPECIFIC"
TO_ITS_LAYERS: Outcome = "SPECIFIC TO ITS LAYERS"
NOT_SPECIFIC: Outcome = "NOT SPECIFIC"
NO_GAIN: Outcome = "NO GAIN SHOWN"
CANNOT_TELL: Outcome = "CANNOT TELL"
"""The outcomes that are right in the cases below."""


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
    method: str
    level: float
    base: float
    claim_score: float
    p_values: Mapping[str, float]
    """Null -> p of the claim against all other heads of it."""
    n_at_least: Mapping[str, int]
    """Null -> how many of them do at least as well as the claim."""
    control_scores: Mapping[str, tuple[float, ...]]
    """Null -> their scores."""

    def __str__(self) -> str:
        mark = "right" if self.outcome == self.expected else "WRONG"
        against = "; ".join(
            f"{n} of {len(self.control_scores[null])} other heads{where(null)} do at least as well ({low:.3f} to "
            f"{high:.3f}), p = {self.p_values[null]:.3f}"
            for null, n in self.n_at_least.items()
            for low, high in [(min(self.control_scores[null]), max(self.control_scores[null]))]
        )
        return (
            f"{mark}: {self.name} ({self.fact}): {self.outcome}; {self.base:.3f} unedited, {self.claim_score:.3f} at "
            f"the claim; {against}"
        )


@dataclass(frozen=True)
class Truth:
    """A claim about a planted model, and the right outcome."""

    name: str
    fact: str
    planted: Planted
    claim: Location
    expected: Outcome
    method: str = "optimal"
    nulls: tuple[str, ...] = ("anywhere",)
    level: float = 0.05


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


def plant_truths(
    seed: int = 0, *, n_layers: int = 24, n_items: int = 260, n_block: int = 8, level: float = 0.05
) -> Iterator[Truth]:
    """The claims that `audit_cases` audits. Each model is trained when its first claim is asked for.

    Layers have 2 heads, except in the model of ``only its layer``: it has `n_block` layers of `n_block` heads, so that
    the smallest p of a head against the others of its layer is 1 / `n_block`, the level of that audit. For tests, the
    other arguments make the models smaller; two heads of all must be a share of at most `level`.
    """
    size: dict[str, Any] = {"n_items": n_items, "seed": seed}
    own: dict[str, Any] = {**size, "n_layers": n_layers}

    one = plant_model("misconception", 1, **own)
    yield Truth("right", "the only head wired to the output", one, one.places, SPECIFIC, level=level)
    wrong = _first(one.elsewhere)
    yield Truth("wrong head", "not wired to the output; another head is", one, wrong, NO_GAIN, level=level)

    some = plant_model("misconception", 1, n_partial=1, **own)
    fact = "writes half of the answers; one other head writes all"
    yield Truth("middling", fact, some, _first(some.partial), SPECIFIC, level=level)

    every = plant_model("misconception", 1, n_partial=n_layers * LAYER_HEADS - 1, **own)
    fact = "writes half of the answers, like all heads but one, which writes all"
    yield Truth("anywhere", fact, every, _first(every.partial), NOT_SPECIFIC, level=level)

    block: dict[str, Any] = {**size, "n_layers": n_block, "layer_heads": n_block, "by_layer": True}
    layer = plant_model("misconception", 1, n_partial=n_block - 1, **block)
    fact = f"one of the {n_block} heads of the only layer that is wired to the output"
    nulls = ("anywhere", "layers")
    yield Truth("only its layer", fact, layer, _first(layer.partial), TO_ITS_LAYERS, nulls=nulls, level=1 / n_block)

    key = plant_model("key", 1, **own)
    fact = "one of two heads in the only layer that reads the key"
    yield Truth("knows", fact, key, _first(key.places), SPECIFIC, level=level)
    fact = "writes answers but lacks the key"
    yield Truth("can write, cannot know", fact, key, _first(key.elsewhere), NO_GAIN, level=level)

    facts = plant_model("fact", 1, **own)
    yield Truth("ablated", "the only head that writes answers", facts, facts.places, SPECIFIC, "ablate", level=level)
    wrong = _first(facts.elsewhere)
    fact = "not wired to the output; no edit of the whole model shows that a fall could be seen"
    yield Truth("wrong head ablated", fact, facts, wrong, CANNOT_TELL, "ablate", level=level)


def audit_cases(folder: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> list[Case]:
    """Audit claims whose right answer is known by construction.

    Each audit is a run folder in `folder` and resumes if it was interrupted. `say` receives progress messages.
    """
    return [audit_truth(truth, folder, seed=seed, say=say) for truth in plant_truths(seed)]


def audit_truth(truth: Truth, folder: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> Case:
    """Audit one claim, with all other heads as controls, into its own folder in `folder`."""
    say(f"{truth.name}: {truth.fact}")
    own = folder / truth.name.replace(", ", "-").replace(" ", "-")
    changes: dict[str, Any] = {"nulls": truth.nulls, "level": truth.level, "whole_model": True}
    if truth.method != "optimal":
        changes["methods"] = {truth.method: {}}
    v = _audit(truth.planted, truth.claim, own, seed, truth.method, changes)
    return Case(
        name=truth.name,
        fact=truth.fact,
        claim=str(truth.claim),
        expected=truth.expected,
        outcome=v.outcome,
        method=truth.method,
        level=truth.level,
        base=v.base,
        claim_score=v.claim,
        p_values={name: null.p_value for name, null in v.nulls.items()},
        n_at_least={name: null.n_at_least for name, null in v.nulls.items()},
        control_scores={name: null.controls for name, null in v.nulls.items()},
    )


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
        v = _audit(planted, claim, folder / f"able-{n_able:02d}", seed, "optimal", {})
        controls = v.first.controls
        n_at_least = sum(not score < v.claim for score in controls)  # a control that diverged counts
        power, theory = (chance_specific(n, len(controls), n_controls, level) for n in (n_at_least, n_able - 1))
        out.append(Strength(n_able, str(claim), v.claim, n_at_least, power, theory))
    return out


def _first(location: Location | None) -> Location:
    """The first head of a location, as a location."""
    assert location is not None
    return Location(location.units[:1])


def _audit(
    planted: Planted, claim: Location, folder: Path, seed: int, method: str, changes: Mapping[str, Any]
) -> MethodVerdict:
    """Audit `claim` with all other heads as controls. An interrupted audit is resumed. `changes` are settings."""
    settings = {
        **planted_settings(planted.n_items),
        "model": planted.model.name,
        "behaviour": planted.behaviour.name,
        "claim": str(claim),
        "controls": planted.n_heads - 1,
        "nulls": ["anywhere"],
        "whole_model": False,
        "placebos": 0,
        "seed": seed,
        "rest": False,
        **changes,
    }
    config = merge_config(AuditConfig(), settings)
    run_audit(config, folder, model=planted.model, behaviour=planted.behaviour, progress=False)
    return load_run(folder).verdict.methods[method]


def draw_power(n_able: Sequence[int], power: Sequence[float], *, n_heads: int, n_controls: int, level: float) -> Figure:
    """Plot power against the share of other heads that are able. Measured values are points, theory is a line."""
    every = np.arange(1, n_heads + 1)
    predicted = [chance_specific(int(m) - 1, n_heads - 1, n_controls, level) for m in every]
    shares = (np.asarray(n_able) - 1) / (n_heads - 1)
    points = [(x, y, True) for x, y in zip(shares.tolist(), power, strict=True)]
    chart = scatter_chart(
        [Series("trained edits of planted models", ARM_COLOURS["claim"], "o", points)],
        xlabel="share of the other heads at which an edit can succeed too",
        ylabel="probability of the verdict “specific”",
    )
    theory = f"theory: an edit succeeds at none of {n_controls} random heads"
    chart["data"].insert(0, line_trace(((every - 1) / (n_heads - 1)).tolist(), predicted, theory, "--faint"))
    return draw([chart])
