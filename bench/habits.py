"""Whether edits gain by a habit of their answers, such as negating, and what stock answers would score.

    python -m bench.habits runs/decide/sets

For the unedited model and each kind of place: mean words per answer, the share of answers with a negation, the share
that give no answer, and the judges' means. Over the controls, Pearson's correlation of each habit with Info*Truth. Then
what the judges say of stock answers, each given to every test question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, fmean

import tyro

from bench.command import header, line, run, say
from bench.training_pilot import judges_of
from bench.work import load_run
from locaudit.judges import Case
from locaudit.records import NO_METHOD, TrialRecord
from locaudit.stats import select
from locaudit.stats.selection import BASE

NEGATION = re.compile(r"\b(?:no|not|none|nothing|never|nobody|nowhere|neither|cannot|\w+n't)\b", re.IGNORECASE)
NO_ANSWER = re.compile(
    r"\bno comment\b|\b(?:not known|unknown)\b|\b(?:do not|don't|cannot|can't) (?:know|say)\b", re.IGNORECASE
)
ASPECTS = ("truth", "info")


@dataclass(frozen=True)
class Settings:
    """Which run to read. It needs judged answers, and at least two controls."""

    folder: tyro.conf.Positional[Path]
    """Run folder with the texts of its answers."""
    stock: tuple[str, ...] = (
        "I have no comment.", "The answer is not known.", "No.", "No, that is not true.", "Nothing happens.",
        "It depends.", "Yes.",
    )  # fmt: skip
    """Answers to give to every test question."""


def main(given: Settings) -> None:
    """Print the three tables."""
    done = load_run(given.folder)
    (method, tried), *_ = ((m, x) for m, x in select(done.records, done.score).items() if m != NO_METHOD)
    kinds: dict[str, list[dict[str, float]]] = {}
    for place, record in {BASE: done.base, **tried}.items():
        if record is not None and "test" in record.answers:
            name = "unedited" if place == BASE else place.arm
            kinds.setdefault(f"controls, {place.null}" if name == "control" else name, []).append(habits(record))
    names = [*next(iter(kinds.values()))[0]]
    print(header(f"mean, {method}", "places", *names))
    for kind, rows in kinds.items():
        print(line([kind, len(rows), *(f"{fmean(row[name] for row in rows):.3f}" for name in names)]))
    controls = [row for kind, rows in kinds.items() if kind.startswith("controls") for row in rows]
    print("\n" + header("over the controls", *names[:-1]))
    product = [row[names[-1]] for row in controls]
    found = [correlation([row[name] for row in controls], product) for name in names[:-1]]
    print(line([f"correlation with {names[-1]}", *(f"{r:.2f}" for r in found)]))
    judges, questions = judges_of(ASPECTS), done.questions["test"]
    print("\n" + header("answer to every test question", *ASPECTS, names[-1]))
    for answer in given.stock:
        cases = [Case(q.text, answer, q.true, q.false) for q in questions]
        means = [fmean(j.probability or 0.0 for j in judges[aspect].score(cases)) for aspect in ASPECTS]
        print(line([answer, *(f"{x:.3f}" for x in (*means, means[0] * means[1]))]), flush=True)
    say(f"judges: {', '.join(judges[aspect].name for aspect in ASPECTS)}")


def habits(record: TrialRecord) -> dict[str, float]:
    """Habits of the answers to test questions, and what judges say of them."""
    answers: Sequence[str] = record.answers["test"]
    truth, info = (fmean(record.questions["test"][f"{aspect}_probability"]) for aspect in ASPECTS)
    return {
        "words": fmean(len(answer.split()) for answer in answers),
        "negated": fmean(bool(NEGATION.search(answer)) for answer in answers),
        "no answer": fmean(bool(NO_ANSWER.search(answer)) for answer in answers),
        "truth": truth,
        "info": info,
        "product": truth * info,
    }


if __name__ == "__main__":
    run(main, Settings, __doc__)
