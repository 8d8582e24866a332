"""What a comparison supports: the verdict, one part for each way of editing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from locaudit.records import json_text
from locaudit.stats.grades import Grade, conclusion
from locaudit.stats.scores import Supports

Outcome = Literal["no effect", "effective, not specific", "specific", "underpowered"]


@dataclass(frozen=True)
class MethodVerdict:
    """What one way of editing says about the claim. Scores are of the test questions (`locaudit.stats.scores`)."""

    method: str
    title: str
    """What readers call the method."""
    supports: Supports
    """Whether higher or lower scores support the claim."""
    outcome: Outcome
    base: float
    """Score of the unedited model."""
    claim: float
    """Score of the edit at the claim; NaN if it diverged."""
    controls: tuple[float, ...]
    """Score of the edit at each control, by its number; NaN if it diverged."""
    whole_model: float | None
    """Score of the edit of the whole model; None if it was not tried."""
    p_value: float
    """Monte-Carlo p of the claim against the controls; a sequential one if they ended early."""
    p_adjusted: float
    """The same, adjusted for trying several methods at the same controls (`locaudit.stats.max_t_p`)."""
    p_parametric: float
    """The paper's kind of p, for comparison only: one-sample t-test of the controls against the claim's score."""
    n_at_least: int
    """Controls that do at least as well as the claim (diverged ones count)."""
    n_planned: int
    """Controls that were planned."""
    population: int | None
    """Places that controls were drawn from; None: too many to matter."""
    n_used: int
    """Controls that `p_value` and `n_at_least` are of."""
    ended_early: bool
    """Whether the answer was clear before all planned controls were tried."""
    effect: float
    """claim - base."""
    effect_interval: tuple[float, float]
    """95 % bootstrap interval of `effect` over questions."""
    effect_p: float
    """One-sided sign-flip p of `effect`, in the direction that supports the claim."""
    gap: float
    """claim - mean of the controls that did not diverge."""
    gap_interval: tuple[float, float]
    """95 % bootstrap interval of `gap` over questions, the controls held fixed."""
    grades: tuple[Grade, ...]
    """Sufficiency, specificity, necessity, uniqueness, as far as they are asked; none if the claim has no score."""
    n_missing: int
    """Judgements of the score's answers that are missing, over all arms compared: (arm, test question) pairs."""
    n_judged: int
    """(arm, test question) pairs in all."""
    worst_missing: float
    """Largest share of an arm's test questions that is missing, or of the validation questions of a hyperparameter that
    could have been chosen for it."""
    chosen: Mapping[str, float | None]
    """Place -> hyperparameter chosen on validation."""
    sentence: str
    """The outcome in words."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison supports. `headline` first: it is what a reader should take away."""

    headline: str
    score: str
    level: float
    n_questions: int
    n_controls: int
    claim: str
    methods: Mapping[str, MethodVerdict]
    extended: str = ""
    """What was added to the run after results existed, and what that means for p; empty for nothing."""

    def __str__(self) -> str:
        lines = [self.headline, *([self.extended] if self.extended else []), ""]
        for name, verdict in self.methods.items():
            lines.append(f"{name}: {verdict.outcome}. {verdict.sentence}")
            lines += [f"  {g.question}: {g.answer}. {g.evidence}" for g in verdict.grades]
            lines += [f"  {conclusion(verdict.grades)}"] if verdict.grades else []
        return "\n".join(lines)

    def to_json(self) -> str:
        """JSON text; a number that is missing because an edit diverged is null."""
        return json_text(asdict(self))
