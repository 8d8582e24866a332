"""Decide each of the paper's claims by the table of rules in claims.yaml, corrected over all claims.

An outcome is ``replicated``, ``not replicated``, or ``open``, with the reason and, if more data would
decide it, how much. Nothing here chooses a rule: a `View` says which scores, margin, null and seeds are read, and only
the view of the settings (`View.of`) decides. Other views are for the specification table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from locaudit.records import Place
from locaudit.report.html import plain
from locaudit.stats import crossed_interval, holm, monte_carlo_p, new_place_p
from locaudit.stats.design import Noise, Size, questions_for
from locaudit.stats.scores import GREEDY, MAX_MISSING
from locaudit.stats.selection import BASE, CLAIM, WHOLE
from locaudit.studies.paper.study import Chosen, LackingError, Study, Values
from locaudit.text import plural

Outcome = Literal["replicated", "not replicated", "open"]
Rule = Mapping[str, Any]
"""One claim of claims.yaml."""
_ARMS = {"claim": CLAIM, "whole": WHOLE, "base": BASE}
_WORDS = {
    "iti claim": "ITI at the probed heads",
    "iti whole": "ITI at all heads",
    "optimal claim": "the optimal edit at the probed heads",
    "optimal whole": "the optimal edit of the whole model",
    "base": "the unedited model",
}
_PLACES = {"iti": "random sets", "sets": "random sets", "single": "random single heads"}


@dataclass(frozen=True)
class Tested:
    """A contrast of scores against a bound."""

    value: float
    """The contrast minus the bound, in the score's units."""
    p_above: float
    """p of the null hypothesis that it is at most 0."""
    p_below: float
    """p of the null hypothesis that it is at least 0."""
    questions: float
    """Squared standard error from questions; those from places and seeds follow."""
    places: float = 0.0
    seeds: float = 0.0
    n: tuple[int, int, int] = (1, 1, 1)
    """Numbers of questions, places and training seeds behind it."""

    def power(self, size: Size, tail: float, *, new_place: bool = False) -> float:
        """Probability that a true value of this size is found at level `tail`, one-sided, by a normal test.

        With `new_place`, it must stand out from single places, of which `places` has the variance over their number.
        """
        n, n_places, n_seeds = self.n
        noise = Noise(self.questions * n, seeds=self.seeds * n_seeds).variance(size)
        spread = self.places * n_places
        needed = -float(special.ndtri(tail)) * math.sqrt(noise + (spread if new_place else spread / size.controls))
        left = math.sqrt(noise + (0.0 if new_place else spread / size.controls))
        return float(special.ndtr((abs(self.value) - needed) / max(left, 1e-100)))


def compare(own: Values, others: Values | None = None, bound: ArrayLike = 0.0) -> Tested:
    """Test `own` (seeds, questions), minus the mean of `others` (places, seeds, questions), against the bound's mean.

    The arrays have pseudo-values. Questions, places and seeds are random (`crossed_interval`), the bound's too. The
    interval of `crossed_interval` allows for skewed questions. This test does not: near a bound they can disagree.
    """
    if others is None:
        others = np.zeros((2, *own.shape))
    found = crossed_interval((own - np.asarray(bound))[:, None], others[:, :, None])
    z = found.lead / found.se if found.se else math.nan
    above, below = (1.0 if math.isnan(z) else float(special.stdtr(found.df, x)) for x in (-z, z))
    places = 0.0 if math.isnan(found.se_places) else found.se_places**2
    n = own.shape[-1], len(others), len(own)
    return Tested(found.lead, above, below, found.se_questions**2, places, found.se_seeds**2, n)


def at_least(p_values: Sequence[float], n: int) -> float:
    """P of the null hypothesis that fewer than `n` of these null hypotheses are false (partial conjunction).

    With sorted p, it is (N - n + 1) p_(n), valid under any dependence. Source: Benjamini and Heller 2008, equation 5.
    """
    return min(1.0, (len(p_values) - n + 1) * sorted(p_values)[n - 1]) if 1 <= n <= len(p_values) else 1.0


@dataclass(frozen=True)
class Finding:
    """A claim under one view."""

    measured: str
    p_yes: float = 1.0
    p_no: float = 1.0
    estimate: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    bound: float = math.nan
    open: str = ""
    """Why nothing can be decided; empty otherwise."""
    tested: Tested | None = None
    """The comparison on which the decision hangs."""
    matching: tuple[int, ...] = ()
    """Numbers of the places that are within the margin, after Holm's correction within the claim."""

    @property
    def p(self) -> float:
        """The p-value of both directions."""
        return min(1.0, 2 * min(self.p_yes, self.p_no))

    def outcome(self, p: float, level: float) -> Outcome:
        """The decision with this p, corrected or not."""
        if self.open or p > level:
            return "open"
        return "replicated" if self.p_yes < self.p_no else "not replicated"


@dataclass(frozen=True, eq=False)
class View:
    """What is read of a study: the choices under which claims are looked at."""

    study: Study
    judged: str
    """The score that stands for Info*Truth."""
    margin: float
    mc: str = "mc2"
    null: str = "anywhere"
    seeds: tuple[int, ...] = (0,)
    """Numbers of the training seeds whose scores are averaged."""
    strength: Literal["chosen", "lowest", "highest"] = "chosen"
    """Whether validation questions choose the strength at each place, or all have the lowest or highest one."""

    @classmethod
    def of(cls, study: Study) -> View:
        """The view that decides: as the settings and claims.yaml have it."""
        seeds = tuple(range(study.config.training_seeds))
        return cls(study, study.config.score, study.rules["margin"], seeds=seeds)

    def score(self, rule: Rule) -> str:
        """Name of the score that a claim is about."""
        kind = "_probability" if "_probability" in self.judged else ""
        ending = GREEDY if self.judged.endswith(GREEDY) else ""
        return {"judged": self.judged, "truth": f"truth{kind}{ending}", "mc2": self.mc}[rule["score"]]

    def chosen(self, method: str, rule: Rule) -> list[Chosen]:
        """The edits by a method, ``iti``, ``optimal`` or ``single``, one for each training seed."""
        score, names = self.score(rule), {"iti": ["iti"], "single": ["single"]}
        parts = names.get(method) or [f"sets-{i}" if i else "sets" for i in self.seeds]
        plain = [self.study.chosen(part, score) for part in parts]
        strength = None
        if self.strength != "chosen":
            tried = {x.spec.hyperparameter or 0.0 for x in plain[0].trials[CLAIM]}
            strength = {"lowest": min, "highest": max}[self.strength](tried)
        elif rule.get("same_dose"):
            best = plain[0].records[CLAIM]
            strength = None if best is None else best.spec.hyperparameter
        return plain if strength is None else [self.study.chosen(part, score, strength) for part in parts]

    def psi(self, arm: str, rule: Rule) -> Values:
        """Pseudo-values of an arm such as ``optimal whole``, or of ``base``, (seeds, questions)."""
        method, _, place = ("optimal base" if arm == "base" else arm).partition(" ")
        return np.stack([one.psi(_ARMS[place]) for one in self.chosen(method, rule)])

    def gain(self, arm: str, rule: Rule) -> Values:
        """Gain of an arm over the unedited model, (seeds, questions)."""
        return self.psi(arm, rule) - self.psi("base", rule)

    def at_places(self, method: str, rule: Rule) -> Values:
        """Pseudo-values at the random places of the view's null, (places, seeds, questions); NaN without a score."""
        several, null = self.chosen(method, rule), rule.get("among", self.null)
        places: list[Place] = several[0].places("anywhere" if method == "single" else null)
        if not places:
            raise LackingError(f"not run: {'layer_sets' if null == 'layers' else f'places of the null {null}'}")
        return np.stack([[one.psi(place) for one in several] for place in places])

    @cached_property
    def level(self) -> float:
        """Level of the claims."""
        return float(self.study.rules["level"])


def judge_claims(study: Study) -> list[dict[str, Any]]:
    """The paper's claims in order, each with its text, rule, what was measured, and the outcome."""
    view, rules = View.of(study), study.rules
    found = [evaluate(rule, view) for rule in rules["claims"]]
    adjusted = holm([1.0 if one.open else one.p for one in found])
    rows = []
    for rule, one, p in zip(rules["claims"], found, adjusted, strict=True):
        outcome = one.outcome(p, view.level)
        size = describe_size(rule, one, study) if outcome == "open" and not one.open else ""
        told = {key: rule[key] for key in ("name", "section", "says", "estimand", "rule")}
        told["ours"] = rule["says"].startswith("(Ours.)")  # not one of the paper's
        numbers = {"estimate": one.estimate, "interval_95": one.interval, "bound": one.bound, "p_replicated": one.p_yes,
                   "p_not_replicated": one.p_no, "p_holm": p, "matching": one.matching}  # fmt: skip
        words = {"measured": one.measured, "open": one.open, "size": size}
        flags = [] if one.open else flags_of(rule, view)
        rows.append({**told, **words, **numbers, "flags": flags, "outcome": outcome})
    return rows


def flags_of(rule: Rule, view: View) -> list[str]:
    """Names of the flags of the edits that a claim compares. They change no outcome: the rules do not mention them.

    An edit with a flag may not be the best one there; a whole model with the flag ``superset`` is easy to match.
    """
    methods = (rule.get("method"), rule.get("minus"))
    arms = [
        *(f"{method} claim" for method in methods if method),
        *rule.get("terms", ()),
        rule.get("reference"),
        rule["of"],
    ]
    found: dict[str, None] = {}
    for arm in filter(None, arms):
        method, _, place = arm.partition(" ")
        for flag in (flag for one in view.chosen(method, rule) for flag in one.flags) if place else ():
            # The places of ``superset`` are those with which the whole model compares badly.
            if place == "whole" if flag.name == "superset" else place in flag.places:
                found[f"{flag.name} ({_WORDS[arm]})"] = None
    return list(found)


def evaluate(rule: Rule, view: View) -> Finding:
    """Look at one claim under a view. The p-values are not yet corrected over claims."""
    try:
        found = {"difference": _difference, "lead": _lead, "count": _count, "ranks": _ranks}[rule["test"]](rule, view)
        why = _void(rule, view, found)
        effect = compare(view.gain(rule["of"], rule)).p_above
    except LackingError as lacking:
        return Finding(str(lacking), open=str(lacking))
    if not why and effect > view.level:
        why = f"no proven gain of {_WORDS[rule['of']]} over the unedited model (p = {effect:.2g})"
    return replace(found, p_yes=max(found.p_yes, effect), p_no=max(found.p_no, effect), open=why)


def _void(rule: Rule, view: View, found: Finding) -> str:
    """Why the records allow no decision; empty if they do."""
    study, rules = view.study, view.study.rules
    if found.open:
        return found.open
    if rule.get("equal_dose") and study.config.iti.doses is None:
        return "ITI was run by alphas, so that places have different KL; set iti.doses"
    missing = max(one.missing() for part in parts_of(rule) for one in view.chosen(part, rule))
    if missing > MAX_MISSING:
        return f"{missing:.0%} of the judgements of an edit are missing"
    n = study.sets.base.record.questions["test"]["mc2"]
    if len(n) < rules["least_questions"]:
        return f"{plural(len(n), 'test question')}, fewer than {rules['least_questions']}"
    return ""


def parts_of(rule: Rule) -> set[str]:
    """The parts of a study that a claim is about: ``sets`` (of any seed), ``iti``, ``single``."""
    arms = (rule.get("method"), rule.get("minus"), rule.get("places"), rule.get("reference"), *rule.get("terms", ()))
    named = {str(arm).split()[0].replace("optimal", "sets") for arm in (*arms, rule["of"])}
    return named & _PLACES.keys()


def _directed(rule: Rule, above: float, below: float) -> tuple[float, float]:
    """(p of yes, p of no)."""
    return (above, below) if rule["is"] == "above" else (below, above)


def _difference(rule: Rule, view: View) -> Finding:
    own = sum(w * view.psi(arm, rule) for arm, w in rule["terms"].items())
    bound = rule["bound"] * view.margin * view.gain(rule["of"], rule)
    return _finding(rule, np.asarray(own), None, bound)


def _lead(rule: Rule, view: View) -> Finding:
    method, of = rule["method"], rule["of"]
    own, others = view.psi(f"{method} claim", rule), view.at_places(method, rule)
    alone = compare(own, others[~np.isnan(others).any(axis=(1, 2))]).p_above if "minus" in rule else 0.0
    if "minus" in rule:
        own = own - view.psi(f"{rule['minus']} claim", rule)
        others = others - view.at_places(rule["minus"], rule)[: len(others)]  # ITI may have the first ones only
    bound = rule["bound"] * view.margin * view.gain(of, rule)
    kept = others[~np.isnan(others).any(axis=(1, 2))]
    if len(kept) < 2:
        return Finding("no scores at random places", open="no scores at random places")
    found = _finding(rule, own, kept, bound)
    lost = 1 - len(kept) / len(others)
    if lost > view.study.rules["most_diverged"]:
        return replace(found, open=f"{lost:.0%} of the random sets diverged")
    p_yes, told = max(found.p_yes, alone), ""
    if rule.get("new_place"):
        score, random = float(own.mean()), others.mean(axis=(1, 2)).tolist()
        tie = view.chosen(method, rule)[0].tolerance
        p, p_new = monte_carlo_p(score, random, tie), new_place_p(score, random, tie)
        p_yes = max(p_yes, 1.0 if math.isnan(p_new) else p_new) if p <= view.level else 1.0
        told = f"; against one more set p = {plain(p_new, '.2g')}, Monte Carlo p = {p:.3f} ({len(random)} sets)"
    return replace(found, p_yes=p_yes, measured=found.measured + told)


def _finding(rule: Rule, own: Values, others: Values | None, bound: Values) -> Finding:
    """The comparison of a difference or a lead with its bound."""
    own, bound = np.broadcast_arrays(own, bound)
    if others is not None:
        others = np.broadcast_to(others, (len(others), *own.shape))
    shown = crossed_interval(own[:, None], (np.zeros((2, *own.shape)) if others is None else others)[:, :, None])
    tested, at = compare(own, others, bound), float(bound.mean())
    low, high = (plain(x, "+.3f") for x in shown.interval)
    limit = f"; bound {plain(at, '+.3f')}" if rule["bound"] else ""
    text = f"{plain(shown.lead, '+.3f')} (95 %: {low} to {high}){limit}"
    p_yes, p_no = _directed(rule, tested.p_above, tested.p_below)
    return Finding(text, p_yes, p_no, estimate=shown.lead, interval=shown.interval, bound=at, tested=tested)


def _places(rule: Rule, view: View) -> tuple[list[Tested], list[float], list[float]]:
    """For each random place: its comparison with the reference, p that it is within the margin, and that it is not."""
    reference = view.psi(rule["reference"], rule)
    margin = view.margin * view.gain(rule["of"], rule)
    tested, match, apart = [], [], []
    for values in view.at_places(rule["places"].replace("sets", "optimal"), rule):
        own, limit = np.broadcast_arrays(values - reference, margin)
        low, high = compare(own, bound=-limit), compare(own, bound=limit)
        if np.isnan(values).any():  # it diverged: worse than any reference
            match, apart = [*match, 1.0], [*apart, float(np.isnan(reference).any())]
        elif rule["is"] == "within":
            match.append(max(low.p_above, high.p_below))
            apart.append(min(1.0, 2 * min(low.p_below, high.p_above)))
        else:
            match.append(low.p_above)
            apart.append(low.p_below)
        tested.append(low if low.value < high.value or rule["is"] == "above" else high)
    return tested, match, apart


def _matching(match: Sequence[float], view: View) -> tuple[int, ...]:
    return tuple(i for i, p in enumerate(holm(match)) if p <= view.level)


def _count(rule: Rule, view: View) -> Finding:
    tested, match, apart = _places(rule, view)
    n = len(match)
    enough = rule["enough"] if rule["enough"] >= 1 else math.ceil(rule["enough"] * n)
    p_yes, p_no = at_least(match, enough), at_least(apart, n - enough + 1)
    sure, not_sure = len(_matching(match, view)), sum(p <= view.level for p in holm(apart))
    likely = sum(a < b for a, b in zip(match, apart, strict=True))
    text = (
        f"{likely} of {n} {_PLACES[rule['places']]} seem within the margin ({sure} surely, {not_sure} surely not); "
        f"{enough} needed"
    )
    order = np.argsort(match if p_yes <= p_no else apart)
    hangs = tested[order[min(enough if p_yes <= p_no else n - enough + 1, n) - 1]]
    share = likely / n
    return Finding(text, p_yes, p_no, share, bound=enough / n, tested=hangs, matching=_matching(match, view))


def _ranks(rule: Rule, view: View) -> Finding:
    _, match, apart = _places(rule, view)
    ranks = [rank for _, _, rank in view.study.heads("single")[1:]]
    k = view.study.config.probe.top_k
    best = [i for i, rank in enumerate(ranks) if rank <= k]
    others = [match[i] for i in range(len(match)) if i not in best]
    sure = _matching(match, view)
    text = f"of {len(match)} heads, {len(best)} are among the {k} best probed; ranks of those that surely match: " + (
        ", ".join(str(ranks[i]) for i in sure) or "none"
    )
    if not best:
        n = view.study.sets.manifest.shape
        share = k / (n.n_layers * n.n_heads)
        more = math.ceil(math.log(0.05) / math.log1p(-share))
        return Finding(text, open=f"no drawn head is among the best probed; {more} heads would have one with 95 %")
    p_yes = max(at_least(others, 1), *(apart[i] for i in best))
    p_no = at_least([match[i] for i in best], 1)
    return Finding(text, p_yes, p_no, matching=sure)


def describe_size(rule: Rule, found: Finding, study: Study) -> str:
    """What would probably decide a claim, if its true value is the one seen; empty if unknown."""
    tested, rules = found.tested, study.rules
    if tested is None or math.isnan(tested.value):
        return ""
    n, n_places, n_seeds = tested.n
    tail, power = rules["level"] / 2 / len(rules["claims"]), rules["power"]
    is_lead = rule["test"] == "lead"
    new_place = bool(rule.get("new_place")) and tested.value > 0
    if new_place and 1 / (1 + n_places) > rules["level"]:
        return f"it takes at least {math.ceil(1 / rules['level'] - 1e-9) - 1} random sets"
    for factor in (1, 2, 4, 8, 16) if is_lead and not new_place else (1,):
        size = Size(n, controls=n_places * factor, seeds=n_seeds)
        needed = questions_for(lambda at: tested.power(at, tail, new_place=new_place), size, power)
        if needed is not None:
            sets = f" and {size.controls} random sets" if factor > 1 else ""
            return f"about {float(f'{max(needed, n):.2g}'):,.0f} test questions{sets} would probably decide it"
    return f"more questions would not decide it{': places differ too much' if is_lead else ' with these seeds'}"
