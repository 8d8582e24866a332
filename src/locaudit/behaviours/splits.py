"""Training, validation and test questions. All answers of a question go to the same part."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

from locaudit.behaviours.behaviour import Behaviour, Question
from locaudit.config import SplitConfig
from locaudit.errors import ConfigError, DataError
from locaudit.records import content_hash

_PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of questions: to find edits (train), choose hyperparameters (val) and judge claims (test)."""

    train: tuple[Question, ...]
    val: tuple[Question, ...]
    test: tuple[Question, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of every question and answer in each part, in order."""
        return content_hash({part: [asdict(question) for question in getattr(self, part)] for part in _PARTS})


def split_questions(
    behaviour: Behaviour,
    fractions: tuple[float, float, float] = SplitConfig.fractions,
    *,
    seed: int = SplitConfig.seed,
    max_train: int | None = SplitConfig.max_train,
    max_val: int | None = SplitConfig.max_val,
    max_test: int | None = SplitConfig.max_test,
    max_answers: int | None = SplitConfig.max_answers,
) -> Split:
    """Shuffle the questions and divide them by `fractions`; keep at most `max_train`, `max_val` and `max_test` of them.

    With n questions and fractions f, the first two parts end at ``round(n f_1)`` and ``round(n (f_1 + f_2))``.
    TruthfulQA's 817 questions become 490, 164 and 163. Questions are sorted by id before the shuffle, so that the order
    of rows does not matter. The maxima apply after the division, so that the test questions do not depend on
    `max_train`. Of each question, at most `max_answers` true and `max_answers` false answers are kept.

    Questions of one `group` go to the same part. Each part then ends at the end of the group that is nearest to the
    numbers above. If questions have a `split`, they keep it and `fractions` is not used. The seed then only decides
    which questions a maximum keeps.

    Raises `ConfigError` if a fraction or maximum is out of range. Raises `DataError` if only some questions have a
    `split`, or if a part has fewer than 2 questions.
    """
    _check_fractions(fractions)
    caps = {"train": max_train, "val": max_val, "test": max_test}
    for part, cap in {**caps, "answers": max_answers}.items():
        least = 1 if part == "answers" else 2
        if cap is not None and cap < least:
            raise ConfigError(
                got=f"max_{part} = {cap}", expected=f"at least {least}", remedy="raise it or leave it out"
            )
    questions = sorted(behaviour.questions, key=lambda question: question.id)
    if any(question.split for question in questions):
        parts, remedy = _fixed_parts(behaviour.name, questions, seed), "assign more rows to that split"
    else:
        more = "groups" if any(question.group for question in questions) else "questions"
        parts, remedy = _seeded_parts(questions, fractions, seed), f"add {more} or change split.fractions"
    for part in _PARTS:
        if len(parts[part]) < 2:
            raise DataError(
                got=f"{len(parts[part])} {part} question(s) among the {len(behaviour)} of {behaviour.name}",
                expected="at least 2 in each of train, val and test",
                remedy=remedy,
            )
    return Split(**{part: tuple(q.shortened(max_answers) for q in parts[part][: caps[part]]) for part in _PARTS})


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or not all(share > 0 for share in fractions) or abs(sum(fractions) - 1) >= 1e-9:
        raise ConfigError(
            got=f"fractions = {fractions}",
            expected="three positive shares with sum 1",
            remedy="use, for example, (0.6, 0.2, 0.2)",
        )


def _fixed_parts(name: str, questions: Sequence[Question], seed: int) -> dict[str, list[Question]]:
    without = [question.id for question in questions if question.split is None]
    if without:
        raise DataError(
            got=f"{len(without)} of {name}'s {len(questions)} questions without a split (first: id {without[0]!r})",
            expected="a split for every question or for none",
            remedy="give every row the split train, val or test, or none of them",
        )
    return {part: shuffled([question for question in questions if question.split == part], seed) for part in _PARTS}


def _seeded_parts(
    questions: Sequence[Question], fractions: tuple[float, float, float], seed: int
) -> dict[str, list[Question]]:
    ordered = shuffled(questions, seed)
    groups: dict[tuple[bool, str], list[Question]] = {}  # in random order, because the questions are shuffled
    for question in ordered:
        groups.setdefault((bool(question.group), question.group or question.id), []).append(question)
    ends = (0, *accumulate(map(len, groups.values())))
    shares = (fractions[0], fractions[0] + fractions[1])
    first, second = (min(ends, key=lambda end: abs(end - round(len(ordered) * share))) for share in shares)
    chained = [question.id for group in groups.values() for question in group]
    ids = {"train": set(chained[:first]), "val": set(chained[first:second]), "test": set(chained[second:])}
    return {part: [question for question in ordered if question.id in ids[part]] for part in _PARTS}


def shuffled(questions: Sequence[Question], seed: int) -> list[Question]:
    """The questions in random order, which depends only on their order and the seed."""
    return random.Random(seed).sample(questions, len(questions))
