"""Combine several audits of one claim, with different training seeds and question splits, into one verdict.

If claim and controls are the same places in every repeat, each place's score is averaged over the repeats. The claim's
mean is then compared with the controls' means as in a single audit. This is exact, because under the null hypothesis
claim and controls are exchangeable in all repeats at once, and averaging treats them alike.

Places can also differ between repeats: if each repeat chooses the claim from its own training questions, or if controls
are matched by values measured on these. Then means over repeats are not comparable. The p-value is twice the median of
the repeats' p-values, which is valid under any dependence between them (Rueger 1978). So is that of the tests for a
"no", which are combined in this way in any case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.stats.phrases import say, short_p, where
from locaudit.stats.questions import VOID, Answer, Outcome, find_outcome
from locaudit.stats.scores import SIGNS, Supports, reaches
from locaudit.stats.sequential import curtailment
from locaudit.stats.tests import monte_carlo_p
from locaudit.stats.verdict import MethodVerdict, NullResult, Verdict


@dataclass(frozen=True)
class Repeat:
    """One of several audits of a claim."""

    verdict: Verdict
    claim: Location
    controls: Mapping[str, tuple[Location, ...]]
    """Null -> locations of its controls, by number."""
    questions: tuple[str, ...] = ()
    """Ids of the test questions."""


@dataclass(frozen=True)
class NullRepeats:
    """The claim against the controls of one null, over all repeats."""

    name: str
    can_test: bool
    """Whether every repeat had enough places for p to reach the level."""
    answer: Answer
    """Whether the claim is better than its places."""
    p_values: tuple[float, ...]
    p_value: float
    """Monte-Carlo p of the claim's mean score against the controls' mean scores.

    Twice the median of `p_values` if places move between repeats."""
    same_places: bool
    """Whether claim and controls are the same places in every repeat."""
    lead: float
    """Claim minus mean control, mean over repeats; sign flipped if lower scores support the claim."""
    lead_sd: float
    n_at_least: int | None
    """Controls whose mean score is at least as good as the claim's; None if places move."""
    n_controls: int

    @property
    def where(self) -> str:
        """What its places have in common with the claim, to follow a noun; empty for places anywhere."""
        return where(self.name)


@dataclass(frozen=True)
class MethodRepeats:
    """The result of one method over all repeats."""

    outcome: Outcome
    """Outcome over all repeats."""
    outcomes: tuple[Outcome, ...]
    """Outcome of each repeat alone."""
    nulls: Mapping[str, NullRepeats]
    """Name -> the claim against the controls of each null."""
    effect_p: float
    """p of the claim's gain: twice the median of the repeats' p, valid under any dependence (Rueger 1978)."""
    gains: tuple[float, ...]
    """Claim minus unedited model, one value per repeat."""
    gain: float
    gain_sd: float
    """Standard deviation of the gain between repeats."""
    gain_interval: tuple[float, float]
    """95 % t-interval of the mean gain over repeats. Repeats share questions, so it may be too narrow."""

    def sentence(self, score: str) -> str:
        """The result in one sentence, with its numbers."""
        alone = ", ".join(f"{self.outcomes.count(x)} {x}" for x in dict.fromkeys(self.outcomes))
        places = "; ".join(
            say("repeats", "same_places" if r.same_places else "moving", r=r, p=short_p(r.p_value),
                lead=say("repeats", "lead", r=r))
            for r in self.nulls.values()
        )  # fmt: skip
        text = "unscored" if math.isnan(self.gain) else "sentence"
        return say("repeats", text, m=self, score=score, p=short_p(self.effect_p), places=places, alone=alone)


@dataclass(frozen=True)
class RepeatsVerdict:
    """The verdict over several repeats of an audit."""

    n_repeats: int
    n_planned: int
    """Number of planned repeats. While some are missing, the outcome is `CANNOT TELL`."""
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
        outcomes = ", ".join(
            f"{name}: {m.outcome} ({', '.join(f'p{r.where} = {r.p_value:.3f}' for r in m.nulls.values())})"
            for name, m in self.methods.items()
        )
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
    nulls = dict.fromkeys(name for repeat in repeats for name in repeat.controls)
    same = {
        name: len(set(claims)) == 1 and len({repeat.controls.get(name) for repeat in repeats}) == 1 for name in nulls
    }
    alike = len({repeat.questions for repeat in repeats}) == 1 and bool(repeats[0].questions)
    n_planned, n = n_planned or len(repeats), len(repeats)
    methods = {
        name: _combine([v.methods[name] for v in verdicts], first, same, n < n_planned) for name in first.methods
    }
    return RepeatsVerdict(n, n_planned, first.score, first.level, tuple(map(str, claims)), overlap, alike, methods)


def _combine(
    found: Sequence[MethodVerdict], first: Verdict, same_places: Mapping[str, bool], more_planned: bool
) -> MethodRepeats:
    """Combine the verdicts `found` by one method, one per repeat; without an outcome if more repeats are planned."""
    claim = SIGNS[found[0].supports] * float(np.mean([v.claim for v in found]))
    gains = [v.effect for v in found]
    nulls = {
        name: _combine_null(
            [v.nulls[name] for v in found], claim, first, found[0].supports, same_places.get(name, True)
        )
        for name in found[0].nulls
        if all(name in v.nulls for v in found)
    }
    effect_p = min(1.0, 2 * float(np.median([v.effect_p for v in found])))
    sd = float(np.std(gains, ddof=1))
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * sd / math.sqrt(len(gains))
    questions = [v.question("works") for v in found]
    is_void = more_planned or math.isnan(claim) or any(q.open in VOID for q in questions)
    works: Answer = "open"
    if not is_void:
        works = _answer(effect_p, [q.p_no if q.answer == "no" else 1.0 for q in questions], first.level)
    return MethodRepeats(
        outcome=find_outcome(works, {name: null.answer for name, null in nulls.items() if null.can_test}),
        outcomes=tuple(v.outcome for v in found),
        nulls=nulls,
        effect_p=effect_p,
        gains=tuple(gains),
        gain=float(np.mean(gains)),
        gain_sd=sd,
        gain_interval=(float(np.mean(gains)) - half, float(np.mean(gains)) + half),
    )


def _combine_null(
    found: Sequence[NullResult], claim: float, first: Verdict, supports: Supports, same_places: bool
) -> NullRepeats:
    """Combine the tests against one null, one per repeat. `claim` is the claim's mean score, with higher as better."""
    n, sign, tie, level = min(len(r.controls) for r in found), SIGNS[supports], first.tolerance, first.level
    controls = sign * np.mean([r.controls[:n] for r in found], axis=0) if n else np.zeros(0)
    leads = [sign * r.lead for r in found]
    p_value = 1.0 if math.isnan(claim) else monte_carlo_p(claim, controls.tolist(), tie)
    if not same_places:
        p_value = min(1.0, 2 * float(np.median([r.p_value for r in found])))
    # Twice the median p has the smallest value 2 / (1 + n), that of (n + 1) / 2 - 1 controls in a single audit.
    is_possible = curtailment(n if same_places else (n + 1) // 2 - 1, level) > 0
    return NullRepeats(
        name=found[0].name,
        can_test=all(r.can_test for r in found),
        answer=_answer(p_value if is_possible else 1.0, [r.p_no if r.answer == "no" else 1.0 for r in found], level),
        p_values=tuple(r.p_value for r in found),
        p_value=p_value,
        same_places=same_places,
        lead=float(np.mean(leads)),
        lead_sd=float(np.std(leads, ddof=1)),
        n_at_least=int(np.sum(reaches(controls, claim, tie))) if same_places else None,
        n_controls=n,
    )


def _answer(p_yes: float, p_no: Sequence[float], level: float) -> Answer:
    """Yes if `p_yes` is significant; no if twice the median of the repeats' `p_no` is; else open."""
    if p_yes <= level:
        return "yes"
    return "no" if 2 * float(np.median(np.nan_to_num(p_no, nan=1.0))) <= level else "open"
