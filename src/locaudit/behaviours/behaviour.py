"""A behaviour: questions, each with wanted (true) and unwanted (false) answers."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from locaudit.errors import DataError
from locaudit.records import content_hash
from locaudit.text import plural

Style = Literal["qa", "chat", "completion"]


@dataclass(frozen=True)
class Question:
    """One question and its answers, as the text that is scored."""

    id: str
    """Unique within the behaviour. If empty, it becomes a hash of the question and its answers in any order."""
    text: str
    """The question itself, without ``Q:``."""
    true: tuple[str, ...]
    """Wanted answers."""
    false: tuple[str, ...]
    """Unwanted answers."""
    best: str | None = None
    """The wanted answer that MC1 uses, one of `true`. None: the first of them."""
    category: str = ""
    """A label of your choice; any text."""
    split: str | None = None
    """``train``, ``val`` or ``test`` if the data fix the split. None: the question is assigned at random (seeded)."""
    group: str = ""
    """Questions of one group, such as rewordings of one question or the questions of a domain, go to the same part of
    the split. Empty: the question is a group of its own."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings of `text`. The `paraphrase_score` is measured on them, and audits can repeat with one of them
    (``prompt.wording``)."""
    subject: str = ""
    """What the question is about, a part of `text`. Edits with positions ``subject`` act on the last token of its first
    occurrence. Empty: not marked."""
    neighborhood: tuple[str, ...] = ()
    """Prompts about something else, after which the *false* answers are right. An edit should leave them so, which the
    `neighborhood_score` measures."""
    paired: str = ""
    """Another prompt, which differs from `text` in what is to be localized. `locaudit.find` can replace a unit's output
    by its output after this prompt. Empty: none."""

    def __post_init__(self):
        if not self.id:
            content = [self.text, sorted(self.true), sorted(self.false)]
            object.__setattr__(self, "id", content_hash(content, 12))
        where = f"question {self.id!r} ({self.text[:60]!r})"
        if not self.text.strip():
            raise DataError(got=f"question {self.id!r} with empty text", expected="a question", remedy="delete the row")
        for name, answers in (("true", self.true), ("false", self.false)):
            if not answers:
                raise DataError(
                    got=f"{where} without a {name} answer",
                    expected="at least one true and one false answer for each question",
                    remedy="add an answer or delete the row",
                )
            if not all(answer.strip() for answer in answers):
                raise DataError(got=f"{where} with an empty {name} answer", expected="text", remedy="delete the answer")
        both = set(self.true) & set(self.false)
        if both:
            raise DataError(
                got=f"{where} with {sorted(both)[0]!r} both true and false",
                expected="each answer either true or false",
                remedy="delete it from one of the lists",
            )
        if self.best is not None and self.best not in self.true:
            raise DataError(
                got=f"{where} with the best answer {self.best!r}",
                expected="one of its true answers",
                remedy="add the best answer to the true answers",
            )
        if self.subject not in self.text:
            raise DataError(
                got=f"{where} with the subject {self.subject!r}",
                expected="a part of the question (in each wording)",
                remedy="copy it from the question, or leave it out",
            )
        if self.split not in (None, "train", "val", "test"):
            raise DataError(
                got=f"{where} with split {self.split!r}", expected="train, val or test", remedy="correct its split"
            )

    @property
    def answers(self) -> tuple[str, ...]:
        """The true answers, then the false ones."""
        return self.true + self.false

    @property
    def best_index(self) -> int:
        """Position of the best answer in `answers`."""
        return 0 if self.best is None else self.true.index(self.best)

    def shortened(self, n_answers: int | None) -> Question:
        """The question with its first `n_answers` true and false answers, and in any case the best one (None: all)."""
        if n_answers is None:
            return self
        best_first = sorted(self.true, key=lambda answer: answer != self.best)
        return replace(self, true=tuple(best_first[:n_answers]), false=self.false[:n_answers])


@dataclass(frozen=True)
class Behaviour:
    """A named set of questions.

    Raises `DataError` if a question or an id occurs twice: a repeated question could be both in training and in test.
    """

    name: str
    questions: tuple[Question, ...]
    aspects: tuple[str, ...] = ("truth", "info")
    """What judges assess in an answer. First comes the quality that the behaviour is about (is the answer true?), then
    qualities that an edit must not destroy (is it informative?). If empty, as for A/B data, answers are not judged by
    default."""
    primer: str = ""
    """Instruction and example questions with answers, put before each scored question. Empty: none."""
    style: Style = "qa"
    """The format that ``prompt.style: auto`` stands for (`locaudit.behaviours.format`)."""
    notes: tuple[str, ...] = ()
    """Warnings about the data that a reader should know before believing a score, each one or two sentences long."""

    def __post_init__(self):
        if not self.questions:
            raise DataError(got=f"{self.name} without questions", expected="questions", remedy="check the data")
        seen: dict[str, str] = {}
        for question in self.questions:
            for key in (f"id {question.id}", normalise(question.text)):
                if key in seen:
                    raise DataError(
                        got=f"the question {question.text[:80]!r} twice (ids {seen[key]!r} and {question.id!r})",
                        expected="each question and each id once, so that no question is both in training and in test",
                        remedy="merge their answers into one row, or delete one row",
                    )
                seen[key] = question.id

    def __len__(self) -> int:
        return len(self.questions)

    def __repr__(self) -> str:
        asked = ", ".join(self.aspects) or "nothing"
        return f"Behaviour({self.name!r}: {plural(len(self), 'question')}, judged for {asked})"

    def worded(self, number: int) -> Behaviour:
        """The behaviour with the paraphrase of that number, from 1, in place of each question; 0: as it is.

        Ids, answers and splits stay. Raises `DataError` if a question has fewer paraphrases.
        """
        short = next((q for q in self.questions if len(q.paraphrases) < number), None)
        if short is not None:
            raise DataError(
                got=f"prompt.wording = {number} for {self.name}, whose question {short.text[:60]!r} has "
                f"{len(short.paraphrases)} paraphrases",
                expected=f"{number} for each question",
                remedy='write them into each JSONL row as "paraphrases": [...]; or ask for fewer wordings',
            )
        if not number:
            return self
        return replace(self, questions=tuple(replace(q, text=q.paraphrases[number - 1]) for q in self.questions))

    @property
    def fingerprint(self) -> str:
        """Hash of every question and answer, in order."""
        return content_hash([asdict(question) for question in self.questions])

    def to_text(self) -> str:
        """The whole behaviour as JSON, which `load_behaviour` reads from a file with all its fields."""
        return json.dumps(_MARK | asdict(self), indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Behaviour:
        """The behaviour whose `to_text` this is. Raises `DataError` for missing or unknown fields."""
        try:
            fields = {key: _frozen(item) for key, item in value.items() if key not in _MARK}
            return cls(questions=tuple(Question(**question) for question in fields.pop("questions")), **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(
                got=f"a saved behaviour that was changed ({error})",
                expected="the fields that locaudit wrote",
                remedy="restore the file, or write the questions as JSONL",
            ) from None


_MARK = {"locaudit": "behaviour"}
"""The first entry of a behaviour that was saved with `Behaviour.to_text`."""


def is_saved(text: str) -> bool:
    """Whether a file's text was written by `Behaviour.to_text`."""
    return text.startswith(json.dumps(_MARK, indent=1)[:-2])


def _frozen(value: Any) -> Any:
    """JSON lists as tuples."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def normalise(text: str) -> str:
    """The text in lower case, with single spaces and without punctuation at its ends, to find repeated questions."""
    text = unicodedata.normalize("NFC", text)
    return re.sub(r"\s+", " ", text.casefold()).strip(" .?!,;:'\"")


def with_period(answer: str) -> str:
    """The stripped answer, plus a period unless it ends in ``.``, ``!`` or ``?`` (as in the ITI reference code).

    The marks that stand for these in other scripts count, too.
    """
    answer = answer.strip()
    return answer if answer.endswith((".", "!", "?", "…", "。", "！", "？", "।", "؟", "۔")) else answer + "."


def unique(answers: Sequence[str]) -> tuple[str, ...]:
    """The answers stripped, without empty or repeated ones, in their order."""
    return tuple(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
