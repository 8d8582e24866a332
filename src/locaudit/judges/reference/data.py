"""Labelled answers with the references of their questions, from files like TruthfulQA's judge data."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from locaudit.behaviours.behaviour import normalise
from locaudit.behaviours.loaders import load_behaviour
from locaudit.errors import DataError
from locaudit.judges.base import ASPECTS, Case
from locaudit.judges.labelled import is_held_out, read_labelled

_MAX_UNKNOWN = 0.01
"""Largest share of questions without references; their rows are left out and counted."""


@dataclass(frozen=True)
class Labelled:
    """One distinct (question, answer) with its labels."""

    case: Case
    labels: Mapping[str, bool | None]
    """Aspect -> majority of its rows; None where they tie."""
    is_reference: bool
    """Whether the answer equals a reference of its question after normalisation."""


@dataclass(frozen=True)
class JudgeData:
    """All labelled answers of two files, by question."""

    answers: tuple[Labelled, ...]
    counts: Mapping[str, int]
    """Rows, distinct pairs, conflicts and questions, as reported by `fit` and `validate`."""
    references_sha256: str

    def part(self, held_out: bool) -> list[Labelled]:
        """The answers to held-out questions, or to those for fitting."""
        return [answer for answer in self.answers if is_held_out(answer.case.question) == held_out]


def load_judge_data(
    truth: Path, info: Path, references: Path | None, *, known_sha256: str | None, only_known: bool
) -> JudgeData:
    """Read both files and the references.

    Rows are merged to distinct pairs of normalised question and stripped answer. A pair's label is the majority of
    its rows; where they tie it has none for that aspect. `references` None takes the ``TruthfulQA*.csv`` beside
    `truth` or one folder up whose SHA-256 is `known_sha256`; unless `only_known`, a single one of another hash will
    do. Questions without references are left out when they are few. Raises `DataError`.
    """
    votes: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    n_rows = 0
    for aspect, path in (("truth", Path(truth)), ("info", Path(info))):
        for row in read_labelled(path, ASPECTS[aspect]):
            votes[normalise(row.case.question), row.case.answer][aspect].append(row.yes)
            n_rows += aspect == "truth"
    file = Path(references) if references is not None else _find(Path(truth), known_sha256, only_known)
    questions = _questions(file)
    all_questions = {question for question, _ in votes}
    unknown = all_questions - set(questions)
    _check_known(sorted(unknown), len(all_questions), file)
    answers, conflicts = [], 0
    for (key, answer), by_aspect in sorted(votes.items()):
        if key in unknown:
            continue
        text, true, false = questions[key]
        labels = {aspect: _majority(by_aspect.get(aspect, [])) for aspect in ("truth", "info")}
        conflicts += any(len(set(found)) > 1 for found in by_aspect.values())
        is_reference = normalise(answer) in {normalise(reference) for reference in true + false}
        answers.append(Labelled(Case(text, answer, true, false), labels, is_reference))
    counts = {
        "rows": n_rows,
        "distinct_pairs": len(answers),
        "pairs_with_conflicting_labels": conflicts,
        "reference_pairs": sum(answer.is_reference for answer in answers),
        "questions": len(all_questions) - len(unknown),
        "questions_without_references": len(unknown),
    }
    return JudgeData(tuple(answers), counts, sha256_of(file))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _majority(labels: Sequence[bool]) -> bool | None:
    n_yes = sum(labels)
    return None if 2 * n_yes == len(labels) else 2 * n_yes > len(labels)


def _questions(file: Path) -> dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]:
    with warnings.catch_warnings():
        # An answer on both sides is dropped from both; it is no news to who fits a judge.
        warnings.simplefilter("ignore", UserWarning)
        behaviour = load_behaviour(file)
    return {
        normalise(question.text): (question.text, question.true, question.false) for question in behaviour.questions
    }


def _check_known(unknown: Sequence[str], n_questions: int, file: Path) -> None:
    # A release of the references may lack a question of another; more than that is another file.
    if len(unknown) > _MAX_UNKNOWN * n_questions:
        raise DataError(
            got=f"{len(unknown)} question(s) without references in {file} (first: {unknown[0]!r:.80})",
            expected="references for the judged questions",
            remedy="name the file of references that belongs to the judged answers",
        )


def _find(truth: Path, known_sha256: str | None, only_known: bool) -> Path:
    folders = (truth.resolve().parent, truth.resolve().parent.parent)
    found = [file for folder in folders for file in sorted(folder.glob("TruthfulQA*.csv"))]
    known = [file for file in found if sha256_of(file) == known_sha256]
    if known:
        return known[0]
    if len(found) == 1 and not only_known:
        return found[0]
    hashes = f"TruthfulQA*.csv with SHA-256 {(known_sha256 or '')[:16]}..."
    raise DataError(
        got=f"{len(found)} TruthfulQA*.csv beside {truth}, none of them known"
        if found
        else f"no references for {truth}",
        expected=f"{hashes} beside it or one folder up" if known_sha256 else "one TruthfulQA*.csv beside it",
        remedy="name the file of references",
    )
