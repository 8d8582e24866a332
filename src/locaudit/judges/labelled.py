r"""Read labelled answers in the format of TruthfulQA's judge data, and split their questions (training, held out).

Each line is ``{"prompt": "Q: {question}\nA: {answer}\nTrue:", "completion": " yes"}``. In files of another aspect, the
prompt ends with that aspect's suffix instead of ``True:``. Whether a question is held out is decided by a hash of its
text. Therefore no list of questions is needed, and judges that are fitted at different times are tested on the same
questions.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError
from locaudit.judges.base import Aspect, Case

SPLIT_RULE = "held out if int(sha256(normalised question), 16) % 5 == 0"
"""The split in words; `is_held_out` implements it."""
_LABELS = {"yes": True, "no": False}


@dataclass(frozen=True)
class LabelledAnswer:
    """A case without references, and its label: whether yes is right."""

    case: Case
    yes: bool


def is_held_out(question: str) -> bool:
    """Whether the question is held out by `SPLIT_RULE`; about one in five is."""
    return int(hashlib.sha256(normalise(question).encode()).hexdigest(), 16) % 5 == 0


def read_labelled(path: str | Path, aspect: Aspect) -> list[LabelledAnswer]:
    r"""Read rows ``{"prompt": "Q: ..\nA: ..\nTrue:", "completion": " yes"}`` from a JSONL file.

    Raises `DataError`, with the line number, for a row in another format or with another aspect's suffix.
    """
    rows, where = [], str(path)
    try:
        # Not splitlines(): JSON strings may contain U+2028 and other characters that it takes for line ends.
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
            where = f"{path}, line {number}"
            if line.strip():
                rows.append(_row(line, aspect.suffix))
        problem = "" if rows else "the file is empty"
    except OSError as error:
        problem = f"which cannot be read ({error.strerror})"
    except ValueError as error:
        problem = str(error)
    if problem:
        expected = rf'{{"prompt": "Q: ...\nA: ...\n{aspect.suffix}", "completion": " yes" or " no"}} on each line'
        raise DataError(got=f"{where}: {problem}", expected=expected, remedy="correct the file, or give another one")
    return rows


def _row(line: str, suffix: str) -> LabelledAnswer:
    try:
        row = json.loads(line)
        prompt, label = str(row["prompt"]), str(row["completion"]).strip()
    except (json.JSONDecodeError, RecursionError):
        raise ValueError("broken JSON") from None
    except (LookupError, TypeError):
        raise ValueError("no text fields prompt and completion") from None
    found = re.fullmatch(rf"Q: (.*?)\nA:(.*)\n{re.escape(suffix)}", prompt, re.DOTALL)
    if label not in _LABELS:
        raise ValueError(f"the completion {label!r:.40}")
    if found is None or not found[1].strip():
        raise ValueError(f"the prompt {prompt!r:.60}")
    return LabelledAnswer(Case(found[1].strip(), found[2].strip()), _LABELS[label])
