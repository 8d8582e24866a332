"""The verdict of an audit, with one part per method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from statistics import fmean

from locaudit.records import json_text
from locaudit.stats.changes import Changes
from locaudit.stats.measured import MARGIN
from locaudit.stats.off_target import OffTarget
from locaudit.stats.optimisation import Flag
from locaudit.stats.phrases import say, short_p, where
from locaudit.stats.questions import Answer, Outcome, Question
from locaudit.stats.scores import TIE, Supports
from locaudit.stats.tests import Contrast

WIDTH = 130
"""Default width of a verdict's text, in characters."""


@dataclass(frozen=True)
class NullResult:
    """The claim against the controls of one null."""

    name: str
    can_test: bool
    """Whether it has enough places for p to reach the level; if not, the outcome does not depend on it."""
    answer: Answer
    """Whether the claim is better than its places."""
    controls: tuple[float, ...]
    """Score of the edit at each control, by number; NaN if it diverged or none of its answers is judged."""
    p_value: float
    """Monte-Carlo p of the claim against the controls; a sequential p if they were stopped early."""
    p_no: float
    """p of the test that its places do as well (`locaudit.stats.measured.Measured.nulls`)."""
    p_adjusted: float
    """`p_value` adjusted for testing several methods at the same controls (`locaudit.stats.max_t_p`)."""
    p_new_place: float
    """t-test of the claim against one new place drawn like the controls (`locaudit.stats.new_place_p`).

    It assumes normal scores and does not decide."""
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
    lead: float
    """claim - mean of the controls that did not diverge."""
    lead_interval: tuple[float, float]
    """95 % interval of the lead over the mean of all such places; questions and places are random."""
    true_share: float
    """Share of such places that are truly at least as good as the claim: the noise of questions is taken out."""
    true_share_interval: tuple[float, float]

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
    reason: str
    """Why it is the outcome, in words; with `CANNOT TELL` also the setting to change."""
    questions: tuple[Question, ...]
    """The answers that the outcome follows from."""
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
    """95 % interval of `effect` over questions."""
    effect_p: float
    """One-sided p of `effect`, in the direction that supports the claim (`locaudit.stats.tests.gain_p`)."""
    n_missing: int
    """Number of (arm, test question) pairs without a judgement."""
    n_judged: int
    """Number of (arm, test question) pairs."""
    worst_missing: float
    """Largest share of missing judgements among an arm's test questions or any trial's validation questions."""
    chosen: Mapping[str, float | None]
    """Place -> hyperparameter chosen on validation questions."""
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

    def question(self, name: str) -> Question:
        """The question of that name; `KeyError` if it was not asked."""
        return {question.name: question for question in self.questions}[name]

    def describe_changes(self) -> str:
        """How many questions the edit at the claim made worse and better, in words; empty if it has no score."""
        claim = self.changes.get("claim")
        if claim is None or not claim.n:
            return ""
        others = [c for place, c in self.changes.items() if place.startswith("control ") and c.n]
        means = {name: fmean(getattr(c, name) for c in others) if others else 0.0 for name in ("worse", "better")}
        return say("changes", "line", c=claim, controls=say("changes", "controls", **means) if others else "")

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
    """What an audit supports. The outcome is that of the `main` method; `str` gives the whole text."""

    main: str
    """The first trained method, or the last method if none is trained; empty if no claim is scored."""
    headline: str
    """Outcome and reason in one sentence."""
    score: str
    level: float
    n_questions: int
    n_controls: int
    claim: str
    methods: Mapping[str, MethodVerdict]
    margin: float = MARGIN
    """Differences below this share of a proven gain count as none: the whole model's, or the claim's for its lead."""
    tolerance: float = TIE
    """Scores that differ by less are ties: the difference may be rounding alone."""
    contrasts: Mapping[str, Contrast] = field(default_factory=dict)
    """Other method -> whether the claim stands out more by it than by the main method, against the first null."""
    subject: str = ""
    """Behaviour, model and claim, in words."""
    power: str = ""
    """What the audit could have seen, and the way to more."""
    extended: str = ""
    """What was added to the run after results existed, and what that means for p; empty for nothing."""

    notes: tuple[str, ...] = ()
    """What a reader should know before believing a score: a gain at one label only, or samples that are not there."""
    off_target: tuple[OffTarget, ...] = ()
    """What the edits do to other behaviours; they do not enter outcomes."""

    @property
    def asked(self) -> Mapping[str, str]:
        """Name -> question in words, of all methods; those of the main method come first."""
        both = [self.methods[self.main], *self.methods.values()] if self.main else []
        return {q.name: q.asked for v in both for q in v.questions}

    @property
    def outcome(self) -> Outcome:
        """The outcome of the main method."""
        return self.methods[self.main].outcome if self.main else "CANNOT TELL"

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
        return self.describe()

    def describe(self, width: int = WIDTH) -> str:
        """The verdict as text: what was tried, the headline, the questions with their answers, and the way to more."""
        notes = [text for text in (self.extended, *self.notes) if text]
        parts = [self.subject, *notes, self.headline, self.table(width), *self.remarks()]
        return "\n\n".join(part for part in parts if part)

    def table(self, width: int = WIDTH) -> str:
        """The questions and answers: a column per method or, if that is wider than `width`, a block per method."""
        names = [self.main, *(name for name in self.methods if name != self.main)] if self.main else []
        cells = {(name, q.name): f"{q.answer:5} {q.seen}" for name in names for q in self.methods[name].questions}
        rows = [["", *(self.methods[name].title for name in names)]]
        rows += [[text, *(cells.get((name, key), "-") for name in names)] for key, text in self.asked.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        if sum(widths) + 2 * len(widths) <= width:
            return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        blocks = []
        for column, name in enumerate(names, start=1):
            lines = [f"  {row[0].ljust(widths[0])}  {row[column]}" for row in rows[1:] if row[column] != "-"]
            blocks.append("\n".join([self.methods[name].title, *lines]))
        return "\n\n".join(blocks)

    def remarks(self) -> list[str]:
        """What follows the table: other methods, flags, questions made worse, open questions, and power."""
        if not self.main:
            return []
        main, found = self.methods[self.main], []
        for name, contrast in self.contrasts.items():
            other, p = self.methods[name], short_p(contrast.p_first)
            found.append(say("says", "rival", title=other.title, outcome=other.outcome, p=p, main=main.title))
        found += [
            main.describe_changes(),
            *(f"{v.title}: {flag.text}" for v in self.methods.values() for flag in v.flags),
        ]
        reason = main.reason.lower()
        opened = [q for q in main.questions if q.why and q.why.lower() not in reason]
        found += [f"{q.asked[:1].upper()}{q.asked[1:]} Open: {q.why}. {q.remedy}." for q in opened]
        return [text for text in (*found, self.power) if text]

    def to_json(self) -> str:
        """The verdict as JSON text; NaN (an edit diverged) becomes null."""
        return json_text({"outcome": self.outcome, **asdict(self)})
