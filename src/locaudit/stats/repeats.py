"""Combine several audits of one claim, with different training seeds and question splits, into one verdict.

If claim and controls are the same places in every repeat, each place's score is averaged over the repeats. The claim's
mean is then compared with the controls' means as in a single audit. This is exact, because under the null hypothesis
claim and controls are exchangeable in all repeats at once, and averaging treats them alike.

Places can also differ between repeats: if each repeat chooses the claim from its own training questions, or if controls
are matched by values measured on these. Then means over repeats are not comparable. The p-value is twice the median of
the repeats' p-values, which is valid under any dependence between them (Rueger 1978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.stats.phrases import say
from locaudit.stats.scores import SIGNS, reaches
from locaudit.stats.sequential import State, curtailment
from locaudit.stats.tests import monte_carlo_p
from locaudit.stats.verdict import MethodVerdict, Outcome, Verdict, find_outcome


@dataclass(frozen=True)
class Repeat:
    """One of several audits of a claim."""

    verdict: Verdict
    claim: Location
    controls: tuple[Location, ...]
    """Locations of the controls, by number."""
    questions: tuple[str, ...] = ()
    """Ids of the test questions."""


@dataclass(frozen=True)
class MethodRepeats:
    """The result of one method over all repeats."""

    outcome: Outcome
    """Outcome over all repeats."""
    outcomes: tuple[Outcome, ...]
    """Outcome of each repeat alone."""
    p_values: tuple[float, ...]
    p_value: float
    """Monte-Carlo p of the claim's mean score against the controls' mean scores.

    If places differ between repeats, it is twice the median of `p_values`."""
    same_places: bool
    """Whether claim and controls are the same places in every repeat."""
    effect_p: float
    """p of the claim's gain: twice the median of the repeats' p, valid under any dependence (Rueger 1978)."""
    gains: tuple[float, ...]
    """Claim minus unedited model, one value per repeat."""
    gain: float
    gain_sd: float
    """Standard deviation of the gain between repeats."""
    gain_interval: tuple[float, float]
    """95 % t-interval of the mean gain over repeats. Repeats share questions, so it may be too narrow."""
    lead: float
    """Claim minus mean control, mean over repeats; sign flipped if lower scores support the claim."""
    lead_sd: float
    n_at_least: int | None
    """Number of controls whose mean score is at least as good as the claim's; None if places differ between repeats."""
    n_controls: int

    def sentence(self, score: str) -> str:
        """The result in one sentence, with its numbers."""
        alone = ", ".join(f"{self.outcomes.count(x)} {x}" for x in dict.fromkeys(self.outcomes))
        places = say("repeats", "same_places" if self.same_places else "moving", m=self)
        text = "unscored" if math.isnan(self.gain) else "sentence"
        return say("repeats", text, m=self, score=score, places=places, alone=alone)


@dataclass(frozen=True)
class RepeatsVerdict:
    """The verdict over several repeats of an audit."""

    n_repeats: int
    n_planned: int
    """Number of planned repeats. While some are missing, the outcome is ``underpowered``."""
    score: str
    level: float
    claims: tuple[str, ...]
    """The claim of each repeat."""
    overlap: float
    """Mean share of units that two repeats' claims have in common (Jaccard); 1 for a given claim."""
    same_questions: bool
    """Whether all repeats have the same test questions, as for a behaviour with a fixed split."""
    methods: dict[str, MethodRepeats]

    def __repr__(self) -> str:
        outcomes = ", ".join(f"{name}: {m.outcome} (p = {m.p_value:.3f})" for name, m in self.methods.items())
        return f"RepeatsVerdict({self.n_repeats} of {self.n_planned} repeats, {self.score}; {outcomes})"

    def __str__(self) -> str:
        lines = [
            f"{name} over {self.n_repeats} repeats: {m.outcome}. {m.sentence(self.score)}"
            for name, m in self.methods.items()
        ]
        if len(set(self.claims)) > 1:
            lines.append(f"The claim moves between repeats; on average, two share {self.overlap:.0%} of its units.")
        return "\n".join(lines)


def combine_repeats(repeats: Sequence[Repeat], n_planned: int | None = None) -> RepeatsVerdict:
    """Combine the verdicts of finished repeats. `n_planned` is the number of planned repeats (None: as many as given).

    Raises `RunFolderError` for fewer than two repeats, or if their methods, scores or levels differ.
    """
    verdicts = [repeat.verdict for repeat in repeats]
    if len({(v.score, v.level, frozenset(v.methods)) for v in verdicts}) != 1 or len(verdicts) < 2:
        raise RunFolderError(
            got=f"{len(verdicts)} repeats" + (" with different scores, levels or methods" if len(verdicts) > 1 else ""),
            expected="two or more finished audits with the same score, level and methods",
            remedy="run the same command again with the same settings",
        )
    first = verdicts[0]
    claims = tuple(repeat.claim for repeat in repeats)
    sets = [set(claim.units) for claim in claims]
    overlap = float(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))
    same = len(set(claims)) == 1 and len({repeat.controls for repeat in repeats}) == 1
    alike = len({repeat.questions for repeat in repeats}) == 1 and bool(repeats[0].questions)
    n_planned, n = n_planned or len(repeats), len(repeats)
    methods = {
        name: _combine([v.methods[name] for v in verdicts], first, same, n < n_planned) for name in first.methods
    }
    return RepeatsVerdict(n, n_planned, first.score, first.level, tuple(map(str, claims)), overlap, alike, methods)


def _combine(found: Sequence[MethodVerdict], first: Verdict, same_places: bool, more_planned: bool) -> MethodRepeats:
    """Combine one method's verdicts `found`, one per repeat. While more repeats are planned, there is no outcome."""
    n, sign, level = min(len(v.controls) for v in found), SIGNS[found[0].supports], first.level
    claim = sign * float(np.mean([v.claim for v in found]))
    controls = sign * np.mean([v.controls[:n] for v in found], axis=0) if n else np.zeros(0)
    gains = [v.effect for v in found]
    leads = [sign * v.gap for v in found]
    p_value = 1.0 if math.isnan(claim) else monte_carlo_p(claim, controls.tolist(), first.tolerance)
    if not same_places:
        p_value = min(1.0, 2 * float(np.median([v.p_value for v in found])))
    effect_p = min(1.0, 2 * float(np.median([v.effect_p for v in found])))
    sd = float(np.std(gains, ddof=1))
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * sd / math.sqrt(len(gains))
    can_tell = not (more_planned or math.isnan(claim) or any(v.outcome == "underpowered" for v in found))
    # Twice the median p is at least 2 / (1 + n), as in a single audit with (n + 1) / 2 - 1 controls.
    is_possible = curtailment(n if same_places else (n + 1) // 2 - 1, level) > 0
    state: State = "open" if not is_possible else "specific" if p_value <= level else "not specific"
    return MethodRepeats(
        outcome=find_outcome(can_tell, effect_p, level, state),
        outcomes=tuple(v.outcome for v in found),
        p_values=tuple(v.p_value for v in found),
        p_value=p_value,
        same_places=same_places,
        effect_p=effect_p,
        gains=tuple(gains),
        gain=float(np.mean(gains)),
        gain_sd=sd,
        gain_interval=(float(np.mean(gains)) - half, float(np.mean(gains)) + half),
        lead=float(np.mean(leads)),
        lead_sd=float(np.std(leads, ddof=1)),
        n_at_least=int(np.sum(reaches(controls, claim, first.tolerance))) if same_places else None,
        n_controls=n,
    )
