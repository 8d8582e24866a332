r"""Labelled answers from files like TruthfulQA's judge data, and the split of their questions.

A line is ``{"prompt": "Q: {question}\nA: {answer}\nTrue:", "completion": " yes"}``; the file of the other aspect ends
its prompts in ``Helpful:``. The split is a rule on the question's text, so no list of questions is kept, and judges
fitted at different times are tested on the same ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError
from locaudit.judges.base import Aspect, Case

SPLIT_RULE = "held out if int(sha256(normalised question), 16) % 5 == 0"
"""The split, in words; `is_held_out` is the split in code."""
_COMPLETIONS = {"yes": True, "no": False}
_EXPECTED = r'{"prompt": "Q: ...\nA: ...\n%s", "completion": " yes" or " no"} on each line'


@dataclass(frozen=True)
class LabelledAnswer:
    """One row: a case, without references, and whether the verdict on it is yes."""

    case: Case
    yes: bool


def is_held_out(question: str) -> bool:
    """`SPLIT_RULE`: about one question in five."""
    return _hash(question) % 5 == 0


def _hash(question: str) -> int:
    return int(hashlib.sha256(normalise(question).encode()).hexdigest(), 16)


def fold_of(question: str, n_folds: int) -> int:
    """Fold of a question for fitting in turns; independent of the split."""
    return _hash(question) // 5 % n_folds


def read_labelled(path: str | Path, aspect: Aspect) -> list[LabelledAnswer]:
    r"""Rows ``{"prompt": "Q: ..\nA: ..\nTrue:", "completion": " yes"}`` of a JSONL file.

    Raises `DataError`, with the line, for a row of another form or with another aspect's suffix.
    """
    path, suffix = Path(path), aspect.suffix
    expected = _EXPECTED % suffix
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            got=f"{path}, which cannot be read ({error.strerror})", expected="a JSONL file", remedy="check the path"
        ) from None
    except UnicodeDecodeError:
        raise DataError(got=f"{path}, which is not UTF-8", expected=expected, remedy="give another file") from None
    if not text.strip():
        raise DataError(got=f"{path}, which is empty", expected=expected, remedy="give another file")
    return [
        _row(line, suffix, DataError(got=f"{path}, line {number}", expected=expected, remedy="mend the line"))
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _row(line: str, suffix: str, bad: DataError) -> LabelledAnswer:
    def fail(why: str) -> DataError:
        return DataError(got=f"{bad.got}: {why}", expected=bad.expected, remedy=bad.remedy)

    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise fail("broken JSON") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "completion")):
        raise fail("no texts prompt and completion")
    prompt, completion = row["prompt"], row["completion"].strip()
    if completion not in _COMPLETIONS:
        raise fail(f"the completion {row['completion']!r:.40}")
    question, mark, answer = prompt.removeprefix("Q: ").removesuffix(f"\n{suffix}").partition("\nA:")
    if not (prompt.startswith("Q: ") and prompt.endswith(f"\n{suffix}") and mark and question.strip()):
        raise fail(f"the prompt {prompt!r:.60}")
    return LabelledAnswer(Case(question.strip(), answer.strip()), _COMPLETIONS[completion])
