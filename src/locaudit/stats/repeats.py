"""Several audits of one claim that differ in training seed and question split: one verdict, and its spread.

Where claim and controls are the same places in every repeat, a place's score is its mean over the repeats, and the
claim's is compared with the controls' as in a single audit: they swap places under the null in all repeats at once, and
what seeds and splits add to a score is averaged in both. Where they move (a claim that is picked anew from training
questions, or controls matched by values measured on these), that mean is no fair comparison, and p is twice the median
of the repeats' own, valid whatever their dependence (Rueger 1978).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from locaudit.errors import RunFolderError
from locaudit.locations import parse_location
from locaudit.stats.sequential import curtailment
from locaudit.stats.tests import monte_carlo_p
from locaudit.stats.verdict import Outcome, Verdict


@dataclass(frozen=True)
class MethodRepeats:
    """What one way of editing says over all repeats."""

    outcome: Outcome
    """The verdict over all repeats."""
    outcomes: tuple[Outcome, ...]
    """That of each repeat alone."""
    p_values: tuple[float, ...]
    p_value: float
    """Monte-Carlo p of the claim's mean score against the controls' mean scores; twice the median where places move."""
    same_places: bool
    """Whether claim and controls are the same places in every repeat."""
    effect_p: float
    """p of the claim's gain over all repeats, valid whatever their dependence (Rueger 1978): twice the median."""
    gains: tuple[float, ...]
    """Claim minus unedited model, a repeat each."""
    gain: float
    gain_sd: float
    """Standard deviation of the gain between repeats."""
    gain_interval: tuple[float, float]
    """95 % t-interval of the mean gain over repeats; repeats share questions, so that it is too narrow if anything."""
    lead: float
    """Claim minus mean control, mean over repeats."""
    lead_sd: float
    n_at_least: int
    """Controls whose mean score reaches the claim's."""
    n_controls: int


@dataclass(frozen=True)
class RepeatsVerdict:
    """The verdict over repeats."""

    n_repeats: int
    score: str
    level: float
    claims: tuple[str, ...]
    """The claim of each repeat."""
    overlap: float
    """Mean share of units that two repeats' claims have in common (Jaccard); 1 for a given claim."""
    methods: dict[str, MethodRepeats]

    def __str__(self) -> str:
        lines = []
        for name, m in self.methods.items():
            alone = ", ".join(f"{m.outcomes.count(x)} {x}" for x in dict.fromkeys(m.outcomes))
            lines.append(
                f"{name} over {self.n_repeats} repeats: {m.outcome}. {self.score} gains {m.gain:+.3f} at the claim (SD "
                f"between repeats {m.gain_sd:.3f}, p = {m.effect_p:.4f}); {m.n_at_least} of {m.n_controls} random "
                f"places do at least as well on average (p = {m.p_value:.3f}), the lead over their mean is "
                f"{m.lead:+.3f} (SD {m.lead_sd:.3f}). Each repeat alone: {alone}."
                + ("" if m.same_places else " Claim or controls move between repeats: p is twice the median of theirs.")
            )
        if self.overlap < 1:
            lines.append(
                f"The claim is picked anew in each repeat; two of them share {self.overlap:.0%} of their units."
            )
        return "\n".join(lines)


def combine_repeats(
    verdicts: Sequence[Verdict], claims: Sequence[str], controls: Sequence[Sequence[str]]
) -> RepeatsVerdict:
    """One verdict from those of the repeats; `claims` and `controls` are their locations, the latter by number.

    Raises `RunFolderError` for fewer than two, or for repeats of different methods or scores.
    """
    first = verdicts[0] if verdicts else None
    if (
        first is None
        or len(verdicts) < 2
        or any((v.score, v.level, set(v.methods)) != (first.score, first.level, set(first.methods)) for v in verdicts)
    ):
        raise RunFolderError(
            got=f"{len(verdicts)} repeats" + (" of different scores or methods" if len(verdicts) > 1 else ""),
            expected="two or more finished audits with the same score, level and methods",
            remedy="run the same command again to finish them",
        )
    sets = [set(parse_location(claim).units) for claim in claims]
    pairs = [(a, b) for i, a in enumerate(sets) for b in sets[:i]]
    same = len(set(claims)) == 1 and len({tuple(places) for places in controls}) == 1
    methods = {name: _combine([v.methods[name] for v in verdicts], first.level, same) for name in first.methods}
    overlap = float(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
    return RepeatsVerdict(len(verdicts), first.score, first.level, tuple(claims), overlap, methods)


def _combine(found: Sequence, level: float, same_places: bool) -> MethodRepeats:
    n = min(len(v.controls) for v in found)
    claim = float(np.mean([v.claim for v in found]))
    controls = np.mean([v.controls[:n] for v in found], axis=0) if n else np.zeros(0)
    gains = [v.effect for v in found]
    leads = [v.gap for v in found]
    p_value = 1.0 if math.isnan(claim) else monte_carlo_p(claim, controls.tolist())
    if not same_places:
        p_value = min(1.0, 2 * float(np.median([v.p_value for v in found])))
    effect_p = min(1.0, 2 * float(np.median([v.effect_p for v in found])))
    sd = float(np.std(gains, ddof=1))
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * sd / math.sqrt(len(gains))
    outcome: Outcome
    if math.isnan(claim) or any(v.outcome == "underpowered" for v in found):
        outcome = "underpowered"
    elif effect_p > level:
        outcome = "no effect"
    elif not curtailment(n if same_places else (n + 1) // 2 - 1, level):
        outcome = "underpowered"
    else:
        outcome = "specific" if p_value <= level else "effective, not specific"
    return MethodRepeats(
        outcome=outcome,
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
        n_at_least=int(np.sum(~(controls < claim))),
        n_controls=n,
    )
