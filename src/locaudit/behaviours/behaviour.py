"""A behaviour: questions, each with wanted (true) and unwanted (false) answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from locaudit.errors import DataError
from locaudit.records import content_hash


@dataclass(frozen=True)
class Question:
    """One question with its answers, in the words that are scored."""

    id: str
    """Unique within the behaviour."""
    text: str
    """The question itself, without ``Q:``."""
    true: tuple[str, ...]
    """Wanted answers."""
    false: tuple[str, ...]
    """Unwanted answers."""
    best: str | None = None
    """The wanted answer that MC1 uses: one of `true`; None stands for the first of them."""
    category: str = ""
    """Free text."""
    split: str | None = None
    """``train``, ``val`` or ``test`` when the file fixes the split; None leaves it to the seeded split."""

    def __post_init__(self):
        where = f"question {self.id!r} ({self.text[:60]!r})"
        if not self.text.strip():
            raise DataError(got=f"question {self.id!r} with empty text", expected="a question", remedy="drop the row")
        for name, answers in (("true", self.true), ("false", self.false)):
            if not answers:
                raise DataError(
                    got=f"{where} without a {name} answer",
                    expected="at least one true and one false answer for each question",
                    remedy="add an answer or drop the row",
                )
            if not all(answer.strip() for answer in answers):
                raise DataError(got=f"{where} with an empty {name} answer", expected="text", remedy="drop the answer")
        both = set(self.true) & set(self.false)
        if both:
            raise DataError(
                got=f"{where} with {sorted(both)[0]!r} both true and false",
                expected="an answer on one side only",
                remedy="drop it from one of the lists",
            )
        if self.best is not None and self.best not in self.true:
            raise DataError(
                got=f"{where} with the best answer {self.best!r}",
                expected="one of its true answers",
                remedy="add the best answer to the true answers",
            )
        if self.split not in (None, "train", "val", "test"):
            raise DataError(
                got=f"{where} with split {self.split!r}", expected="train, val or test", remedy="mend the column"
            )

    @property
    def answers(self) -> tuple[str, ...]:
        """True answers, then false ones."""
        return self.true + self.false

    @property
    def best_index(self) -> int:
        """Position of the best answer in `answers`."""
        return 0 if self.best is None else self.true.index(self.best)


@dataclass(frozen=True)
class Behaviour:
    """A named set of questions. Duplicate questions raise: they could end up on both sides of a split."""

    name: str
    questions: tuple[Question, ...]
    aspects: tuple[str, ...] = ("truth", "info")
    """What is asked of an answer: whether it has the behaviour's quality first, then what an edit must not destroy.
    Empty, as for A/B sets: no judge by default."""
    primer: str = ""
    """Instruction and example pairs that its protocol puts before each scored question; empty for none."""

    def __post_init__(self):
        if not self.questions:
            raise DataError(got=f"{self.name} without questions", expected="questions", remedy="check the file")
        seen: dict[str, str] = {}
        for question in self.questions:
            for key in (f"id {question.id}", normalise(question.text)):
                if key in seen:
                    raise DataError(
                        got=f"the question {question.text[:80]!r} twice (ids {seen[key]!r} and {question.id!r})",
                        expected="each question and each id once, so that none is on both sides of a split",
                        remedy="merge their answers into one row, or drop one",
                    )
                seen[key] = question.id

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        asked = ", ".join(self.aspects) or "nothing"
        return f"Behaviour({self.name!r}: {len(self)} questions, judged for {asked})"

    @property
    def fingerprint(self) -> str:
        """Hash of every question and answer, in order."""
        return content_hash([asdict(question) for question in self.questions])


def normalise(text: str) -> str:
    """Lower case, single spaces, no marks at the ends: what two spellings of one question share."""
    return re.sub(r"\s+", " ", text.casefold()).strip(" .?!,;:'\"")


def with_period(answer: str) -> str:
    """The answer, ending in a period if it ends in no sentence mark (the ITI reference does this)."""
    answer = answer.strip()
    return answer if answer.endswith((".", "!", "?")) else answer + "."


def unique(answers: Sequence[str]) -> tuple[str, ...]:
    """Stripped, without empties or repeats, in order."""
    return tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
