"""The verdict of an audit, with one part per method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from statistics import fmean
from typing import Literal

from locaudit.records import json_text
from locaudit.stats.changes import Changes
from locaudit.stats.grades import Grade, conclusion
from locaudit.stats.off_target import OffTarget
from locaudit.stats.optimisation import Flag
from locaudit.stats.phrases import where
from locaudit.stats.scores import TIE, Supports
from locaudit.stats.sequential import State

Outcome = Literal["no effect", "effective, not specific", "specific to its layers", "specific", "underpowered"]


def find_outcome(can_tell: bool, effect_p: float, level: float, states: Mapping[str, State]) -> Outcome:
    """The outcome of a method from the p of its claim's gain and the state of the test against each null.

    `can_tell` is false if the data allow no conclusion. `states` leaves out nulls with too few places to test. The
    claim is specific if it stands out from each null: an intersection-union test, which needs no correction.
    """
    if can_tell and effect_p > level:
        return "no effect"
    fails = [name for name, state in states.items() if state == "not specific"]
    if can_tell and fails not in ([], ["layers"]):  # whatever the other tests say
        return "effective, not specific"
    if not can_tell or not states or "open" in states.values():
        return "underpowered"
    if fails:
        return "specific to its layers" if "anywhere" in states else "effective, not specific"
    return "specific"


@dataclass(frozen=True)
class NullResult:
    """The claim against the controls of one null."""

    name: str
    can_test: bool
    """Whether it has enough places for p to reach the level; if not, the outcome does not depend on it."""
    state: State
    controls: tuple[float, ...]
    """Score of the edit at each control, by number; NaN if it diverged or none of its answers is judged."""
    p_value: float
    """Monte-Carlo p of the claim against the controls; a sequential p if they were stopped early."""
    p_adjusted: float
    """`p_value` adjusted for testing several methods at the same controls (`locaudit.stats.max_t_p`)."""
    p_parametric: float
    """For comparison with the paper only: one-sample t-test of the controls against the claim's score."""
    n_at_least: int
    """Number of controls that do at least as well as the claim, diverged ones included."""
    n_planned: int
    """Number of planned controls."""
    population: int | None
    """Number of places that controls were drawn from; None if it is practically infinite."""
    n_used: int
    """Number of controls behind `p_value` and `n_at_least`."""
    ended_early: bool
    """Whether the stopping rule ended the test before all planned controls were tried."""
    gap: float
    """claim - mean of the controls that did not diverge."""
    gap_interval: tuple[float, float]
    """95 % bootstrap interval of `gap` over questions; the controls are held fixed."""

    @property
    def where(self) -> str:
        """What its places have in common with the claim, to follow a noun; empty for places anywhere."""
        return where(self.name)


@dataclass(frozen=True)
class MethodVerdict:
    """The result of one method. All scores are on test questions, in the score's units (`locaudit.stats.scores`)."""

    method: str
    title: str
    """The method's name in texts."""
    supports: Supports
    """Whether higher or lower scores support the claim."""
    outcome: Outcome
    base: float
    """Score of the unedited model."""
    claim: float
    """Score of the edit at the claim; NaN if it diverged or none of its answers is judged."""
    whole_model: float | None
    """Score of the edit of the whole model; None if it was not tried."""
    nulls: Mapping[str, NullResult]
    """Name -> the claim against the controls of each null, in the order of the settings."""
    effect: float
    """Effect size: claim - base."""
    effect_interval: tuple[float, float]
    """95 % bootstrap interval of `effect` over questions."""
    effect_p: float
    """One-sided sign-flip p of `effect`, in the direction that supports the claim."""
    grades: tuple[Grade, ...]
    """Sufficiency, specificity, necessity and uniqueness, as far as they apply; none if the claim has no score."""
    n_missing: int
    """Number of (arm, test question) pairs without a judgement."""
    n_judged: int
    """Number of (arm, test question) pairs."""
    worst_missing: float
    """Largest share of missing judgements among an arm's test questions or any trial's validation questions."""
    chosen: Mapping[str, float | None]
    """Place -> hyperparameter chosen on validation questions."""
    sentence: str
    """The outcome in words."""
    changes: Mapping[str, Changes] = field(default_factory=dict)
    """Place -> how many test questions its edit made worse and better than unedited."""
    flags: tuple[Flag, ...] = ()
    """Signs that a better edit exists than the one found."""

    @property
    def deciding(self) -> Mapping[str, NullResult]:
        """The nulls that can test; all if none can."""
        return {name: null for name, null in self.nulls.items() if null.can_test} or self.nulls

    @property
    def first(self) -> NullResult:
        """The first of the nulls that can test: with the default settings, places anywhere."""
        return next(iter(self.deciding.values()))

    def __repr__(self) -> str:
        return f"{self.method}: {self.outcome}; " + ", ".join(f"{k} {v}" for k, v in self._cells().items())

    def _cells(self) -> dict[str, str]:
        """Its main numbers, for a line or a table."""
        cells = {
            "unedited": f"{self.base:.3f}",
            "claim": f"{self.claim:.3f}",
            "whole model": "-" if self.whole_model is None else f"{self.whole_model:.3f}",
        }
        for null in self.nulls.values():
            scored = [x for x in null.controls if not math.isnan(x)]
            cells[f"mean control{null.where}"] = f"{fmean(scored):.3f}" if scored else "-"
            cells[f"controls{null.where} at least as good"] = f"{null.n_at_least} of {null.n_used}"
            cells[f"p{null.where}"] = f"{null.p_value:.3f}"
        return cells


@dataclass(frozen=True)
class Verdict:
    """What an audit supports; `headline` is the conclusion over all methods."""

    headline: str
    score: str
    level: float
    n_questions: int
    n_controls: int
    claim: str
    methods: Mapping[str, MethodVerdict]
    tolerance: float = TIE
    """Scores that differ by less are ties: the difference may be rounding alone."""
    extended: str = ""
    """What was added to the run after results existed, and what that means for p; empty for nothing."""

    notes: tuple[str, ...] = ()
    """What a reader should know before believing a score: a gain at one label only, or samples that are not there."""
    off_target: tuple[OffTarget, ...] = ()
    """What the edits do to other behaviours; they do not enter outcomes."""

    def __repr__(self) -> str:
        about = f"Verdict({self.score} at level {self.level:g}, {self.n_questions} test questions: {self.headline})"
        return "\n".join([about, *(f"  {verdict!r}" for verdict in self.methods.values())])

    def _repr_html_(self) -> str:
        """The headline, and one row per method, for notebooks."""
        rows = [{"method": name, "outcome": v.outcome, **v._cells()} for name, v in self.methods.items()]
        head = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
        body = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row.values()) + "</tr>" for row in rows)
        about = f"{escape(self.score)} over {self.n_questions} test questions, at level {self.level:g}"
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<p><strong>{escape(self.headline)}</strong></p><p>{about}</p>{table}"

    def __str__(self) -> str:
        lines = [self.headline, *([self.extended] if self.extended else []), *self.notes, ""]
        for name, verdict in self.methods.items():
            lines.append(f"{name}: {verdict.outcome}. {verdict.sentence}")
            lines += [f"  {flag.text}" for flag in verdict.flags]
            lines += [f"  {g.question}: {g.answer}. {g.evidence}" for g in verdict.grades]
            lines += [f"  {conclusion(verdict.grades)}"] if verdict.grades else []
        return "\n".join(lines)

    def to_json(self) -> str:
        """The verdict as JSON text; NaN (an edit diverged) becomes null."""
        return json_text(asdict(self))
