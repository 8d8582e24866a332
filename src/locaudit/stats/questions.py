"""The questions that a verdict answers, each with ``yes``, ``no`` or ``open``, and the outcome that follows from them.

moves       does an edit of the whole model move the behaviour at all?
works       does the edit at the claim?
NULL        is it better than edits at the random places of that null?
needed      does the best edit of everything else fall short?

**Yes** needs a test that is significant at the level. **No** needs one, too: it must be shown that a gain, a lead or a
loss is below the margin, or that random places do as well, in an audit that could have shown the opposite. Everything
else is **open**, with the reason and the setting to change. The outcome is read off the answers (`find_outcome`), so
that the two cannot contradict each other. The tests are explained in docs/statistics.md; the texts are in words.toml.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from locaudit.stats.measured import Against, Measured
from locaudit.stats.phrases import say, short, short_interval, short_p, where
from locaudit.stats.scores import MAX_MISSING, SIGNS
from locaudit.stats.selection import BASE, CLAIM, REST, WHOLE
from locaudit.stats.sequential import curtailment
from locaudit.stats.tests import monte_carlo_p

WITHIN = ("layers", "kv-groups")
"""Nulls whose places are in the claim's own layers."""
LEAST_FOR_NO = 100
"""Fewest test questions for a ``no``: with fewer, intervals may miss rare large effects (docs/statistics.md)."""
Answer = Literal["yes", "no", "open", "-"]
"""``-``: not asked, because the claim does not work, or not tried."""
VOID = ("missing", "diverged", "few_questions", "placebo")
"""Reasons for which all questions are open."""
Outcome = Literal["SPECIFIC", "SPECIFIC TO ITS LAYERS", "NOT SPECIFIC", "NO GAIN SHOWN", "CANNOT TELL"]


@dataclass(frozen=True)
class Question:
    """The answer to one question about a claim, with its evidence."""

    name: str
    """``moves``, ``works``, ``needed``, or the name of a null."""
    asked: str
    """The question in words."""
    answer: Answer
    seen: str
    """The numbers behind the answer."""
    estimate: float = math.nan
    """moves, works: gain. Null: lead over the mean of its places. needed: score without the claim - whole model."""
    interval: tuple[float, float] = (math.nan, math.nan)
    """95 % interval of the estimate over questions and, for a null, over places."""
    p: float = math.nan
    """p of the test for ``yes``."""
    p_no: float = math.nan
    """p of the test for ``no``."""
    open: str = ""
    """Name of the reason why it is open, a text in words.toml; empty otherwise."""
    why: str = ""
    """The reason in words."""
    remedy: str = ""
    """The setting to change."""


def find_outcome(works: Answer, nulls: Mapping[str, Answer]) -> Outcome:
    """The outcome that follows from the answers. `nulls` leaves out those with too few places to test.

    The claim is specific if it is better than the random places of each null: an intersection-union test, which needs
    no correction. If it is better than places anywhere but not than those in its layers (or in its groups of heads,
    which are in them), its layers are what matters.
    """
    if works != "yes":
        return "NO GAIN SHOWN" if works == "no" else "CANNOT TELL"
    if any(answer == "no" for name, answer in nulls.items() if name not in WITHIN):
        return "NOT SPECIFIC"
    if not nulls or "open" in nulls.values():
        return "CANNOT TELL"
    if "no" in nulls.values():
        return "SPECIFIC TO ITS LAYERS" if "anywhere" in nulls else "NOT SPECIFIC"
    return "SPECIFIC"


def ask(m: Measured, flags: Collection[str] = ()) -> tuple[Question, ...]:
    """Ask all questions about one method. `flags` names those of its edit at the claim, and ``NAME whole``."""
    asker = _Asker(m, flags)
    works = asker.works()
    nulls = [asker.null(name, null, works) for name, null in m.nulls.items()]
    needed = [asker.needed()] if m.facts.supports == "higher" and REST in m.arms else []
    found = [*([asker.moves()] if WHOLE in m.arms else []), works, *nulls, *needed]
    return tuple(asker.opened(question, asker.void) if asker.void else question for question in found)


class _Asker:
    """Asks the questions about one method, and finds the words."""

    def __init__(self, m: Measured, flags: Collection[str]):
        self.m, self.flags = m, flags
        se = m.gain(CLAIM).se
        self.decimals = min(max(2, math.ceil(-math.log10(se))), 5) if se > 0 else 2
        self.sign = SIGNS[m.facts.supports]  # -1 undoes the flip of `measure`: numbers are shown as they were measured
        terms = {key: text.format(noun=m.design.noun) for key, text in m.facts.terms.items()}
        self.words = partial(say, **terms, noun=m.design.noun, level=m.level)
        self.void = self._void()

    def _void(self) -> str:
        """Why the records allow no answer at all; empty if they do."""
        m = self.m
        applies = m.worst_missing > MAX_MISSING, m.unscored, 2.0**-m.n_questions > m.level, m.placebo_p <= m.level
        return next((name for name, is_so in zip(VOID, applies, strict=True) if is_so), "")

    @property
    def not_best(self) -> str:
        """Why a "no" stays open: a sign that the edit at the claim is not the best one. Empty without such a sign."""
        return next((name.replace(" ", "_") for name in ("not optimised", "unsettled") if name in self.flags), "")

    @property
    def has_enough(self) -> bool:
        """Whether there are enough questions for a ``no``."""
        return self.m.n_questions >= LEAST_FOR_NO

    def number(self, x: float) -> str:
        return short(self.sign * x, self.decimals)

    def interval(self, interval: tuple[float, float]) -> str:
        return short_interval(turned(interval, self.sign), self.decimals)

    def opened(self, question: Question, reason: str, **values: Any) -> Question:
        """The question as open for a reason."""
        m = self.m
        facts = {
            "n_missing": sum(m.missing),
            "n_judged": len(m.missing) * m.n_questions,
            "n_questions": m.n_questions,
            "need_questions": math.ceil(-math.log2(m.level)),
            "need": math.ceil(1 / m.level - 1e-9) - 1,
            "method": m.method,
            "least": LEAST_FOR_NO,
            "base": self.number(m.means[BASE]),
            "limit": self.number(m.bounds[1]),
            **values,
        }
        why, remedy = (self.words(part, reason, **facts) for part in ("open", "remedy"))
        return replace(question, answer="open", open=reason, why=why, remedy=remedy)

    def _gain(self, name: str, place: Any) -> Question:
        """The gain at a place, answered ``yes`` if it is significant; otherwise still to be decided."""
        m, gain = self.m, self.m.gain(place)
        seen = self.words(
            "seen",
            "diverged" if math.isnan(gain.value) else "gain",
            base=self.number(m.means[BASE]),
            score=self.number(m.means[place]),
            interval=self.interval(gain.interval()),
        )
        answer: Answer = "yes" if m.gain_p(place) <= m.level else "open"
        measured = self.sign * gain.value, turned(gain.interval(), self.sign)
        return Question(name, self.words("ask", name), answer, seen.strip(), *measured, m.gain_p(place))

    def moves(self) -> Question:
        question = self._gain("moves", WHOLE)
        if question.answer == "yes":
            return question
        return self.opened(question, "whole_nothing" if self.m.is_proven(CLAIM) else "nothing")

    def works(self) -> Question:
        m, question = self.m, self._gain("works", CLAIM)
        if CLAIM.label in m.destroyed:
            return self.opened(question, "destroyed")
        if question.answer == "yes" or m.unscored:
            return question
        if m.is_at_best(BASE):
            return self.opened(question, "at_best")
        if not m.is_proven(WHOLE):
            return self.opened(question, "nothing" if WHOLE in m.arms else "no_whole")
        if "destroyed whole" in self.flags:
            return self.opened(question, "whole_destroyed")
        question = replace(question, p_no=m.over_margin({CLAIM: 1.0, BASE: -1.0}, of=WHOLE).p_below())
        if question.p_no <= m.level:
            if self.not_best:
                return self.opened(question, self.not_best)
            return replace(question, answer="no") if self.has_enough else self.opened(question, "few_for_no")
        high = self.number(m.gain(CLAIM).interval()[1])
        return self.opened(question, "wide", high=high, margin=self.number(m.margin(WHOLE)))

    def null(self, name: str, null: Against, works: Question) -> Question:
        seen, words = null.look, partial(self.words, where=where(name))
        lead = words("seen", "lead", lead=short(self.sign * null.lead.lead, self.decimals, "+"),
                     interval=self.interval(null.lead.interval))  # fmt: skip
        told = words("seen", "null", g=seen.n_at_least, n=seen.n, p=short_p(null.p_value),
                     lead="" if math.isnan(null.lead.lead) else lead.rstrip())  # fmt: skip
        if seen.ended_early:
            low, high = seen.final
            told += words("seen", "ended", n_planned=null.plan.n_planned, low=low, high=high)
        question = Question(
            name, words("ask", "null"), "-", told, self.sign * null.lead.lead, turned(null.lead.interval, self.sign),
            null.p_value, null.p_no,
        )  # fmt: skip
        if works.answer != "yes":
            return question
        if seen.state == "specific":
            return replace(question, answer="yes")
        reason, values = self._why_open(null)
        if not reason:
            if 2 * null.p_common > self.m.level:  # the lead alone shows it
                told += words("seen", "small", margin=self.number(self.m.margin(CLAIM)))
            elif null.lead.lead > 0:
                told += words("seen", "common", margin=self.number(self.m.margin(CLAIM)))
            return replace(question, answer="no", seen=told)
        return self.opened(question, reason, where=where(name), g=seen.n_at_least, n=seen.n, **values)

    def _why_open(self, null: Against) -> tuple[str, dict[str, Any]]:
        """Why the claim is neither shown to be better than places of a null nor shown not to be; empty if it is."""
        m, seen, plan = self.m, null.look, null.plan
        at_best = [m.is_at_best(place) for place in null.places]
        if not plan.can_test(m.level):
            return "few_places", {"population": plan.population, "least": 1 / (1 + (plan.population or 0))}
        if seen.state == "open" and seen.n < plan.n_planned:
            return "unfinished", {"n_planned": plan.n_planned}
        if m.is_at_best(CLAIM) and 2 * sum(at_best) >= len(at_best):
            return "controls_at_best", {}
        if not curtailment(plan.n_planned, m.level):
            return "few_controls", {"least": 1 / (1 + plan.n_planned)}
        if null.p_no <= m.level:
            return self.not_best or ("" if self.has_enough else "few_for_no"), {}
        return "some", {"more": 2 * plan.n_planned + 1}

    def needed(self) -> Question:
        m, loss = self.m, self.m.contrast({REST: 1.0, WHOLE: -1.0})
        rests = [m.means[place] for place in m.arms if place.is_rest_of_control]
        p_rests = monte_carlo_p(-m.means[REST], [-x for x in rests], m.tolerance) if rests else math.nan
        seen = self.words("seen", "needed", score=self.number(m.means[REST]), whole=self.number(m.means[WHOLE]),
                          interval=self.interval(loss.interval()))  # fmt: skip
        if finite := [x for x in rests if not math.isnan(x)]:
            ends = {"low": self.number(min(finite)), "high": self.number(max(finite)), "p": short_p(p_rests)}
            seen += self.words("seen", "rests", **ends)
        question = Question(
            "needed", self.words("ask", "needed"), "open", seen.strip(), self.sign * loss.value,
            turned(loss.interval(), self.sign),
        )  # fmt: skip
        if math.isnan(m.means[REST]):
            return self.opened(question, "rest_diverged")
        if not m.is_proven(WHOLE) or math.isnan(loss.value):
            return self.opened(question, "no_whole_needed")
        if m.is_at_best(WHOLE) and m.is_at_best(REST):
            return self.opened(question, "rest_at_best")
        if "destroyed whole" in self.flags:
            return self.opened(question, "whole_destroyed")
        if {"superset", "not optimised whole"} & set(self.flags):
            return self.opened(question, "whole_not_best")
        short_by = m.over_margin({WHOLE: 1.0, REST: -1.0}, of=WHOLE)
        tests = [x for x in (short_by.p_above(), p_rests) if not math.isnan(x)]
        question = replace(question, p=max(tests), p_no=short_by.p_below())
        if question.p_no <= m.level:
            return replace(question, answer="no") if self.has_enough else self.opened(question, "few_for_no")
        if short_by.p_above() > m.level:
            return self.opened(question, "between")
        return replace(question, answer="yes") if p_rests <= m.level else self.opened(question, "rests")


def turned(interval: tuple[float, float], sign: float) -> tuple[float, float]:
    """The interval of a value whose sign is flipped if `sign` is -1."""
    low, high = sorted(sign * x for x in interval)
    return low, high


def outcome_of(questions: Sequence[Question]) -> Outcome:
    """The outcome of a method from its questions."""
    answers: dict[str, Answer] = {q.name: q.answer for q in questions}
    others = [q for q in questions if q.name not in ("moves", "works", "needed") and q.open != "few_places"]
    return find_outcome(answers["works"], {q.name: q.answer for q in others})
