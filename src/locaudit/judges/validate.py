"""Validate judges: measure how well they agree with labelled answers to held-out questions."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import mannwhitneyu

from locaudit.behaviours import load_behaviour
from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError
from locaudit.judges.base import Case, Fitted, Judge
from locaudit.judges.labelled import LabelledAnswer, read_labelled
from locaudit.registry import ASPECTS
from locaudit.stats.agreement import compare

CHUNK = 256
"""Number of answers judged between two progress messages."""
MAX_UNKNOWN = 0.01
"""Largest tolerated share of questions without references. Releases of TruthfulQA differ by a few questions."""
N_BINS = 10
"""Number of equal-width bins in the expected calibration error."""


def validate(
    judges: Mapping[str, Judge],
    files: Mapping[str, Path],
    references: Path | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure each aspect's judge on the labelled answers in that aspect's file. Returns plain values, ready for JSON.

    For each aspect, the result has the values of `measure` for three groups of answers:

    - ``reference``: answers that equal a reference of their question, which are easy to judge;
    - ``non_reference``: the other answers, which resemble a model's answers;
    - ``all``: both.

    `references` is a behaviour file with the reference answers. If it is None, `find_references` looks for one near the
    first labelled file. Raises `DataError` like `unseen` and `read_labelled`.
    """
    file = references or find_references(next(iter(files.values())))
    known = read_references(file) if file else {}
    out: dict[str, Any] = {"references_sha256": sha256_of(file) if file else None, "aspects": {}}
    for aspect, judge in judges.items():
        rows = unseen(judge, distinct(read_labelled(files[aspect], ASPECTS[aspect]), known), files[aspect])
        p = judged(judge, rows, say)
        same = np.array([is_reference(row.case) for row in rows])
        parts = {"non_reference": ~same, "reference": same, "all": same | True}
        yes, questions = np.array([row.yes for row in rows]), np.array([row.case.question for row in rows])
        measures = {name: measure(p[part], yes[part], questions[part]) for name, part in parts.items()}
        out["aspects"][aspect] = {"judge": judge.name, "fingerprint": judge.fingerprint, **measures}
    return out


def find_references(rows: Path) -> Path | None:
    """The ``TruthfulQA*.csv`` in the folder of a file or in its parent folder; None if there is not exactly one."""
    folders = (rows.resolve().parent, rows.resolve().parent.parent)
    found = [file for folder in folders for file in folder.glob("TruthfulQA*.csv")]
    return found[0] if len(found) == 1 else None


def read_references(file: Path) -> dict[str, Case]:
    """Normalised question -> a case with the references and an empty answer."""
    with warnings.catch_warnings():
        # The loader drops answers that are both true and false, with a warning that does not matter here.
        warnings.simplefilter("ignore", UserWarning)
        questions = load_behaviour(file).questions
    return {normalise(q.text): Case(q.text, "", q.true, q.false) for q in questions}


def distinct(rows: Sequence[LabelledAnswer], known: Mapping[str, Case]) -> list[LabelledAnswer]:
    """Each (question, answer) pair once, sorted, with the references in `known`.

    The label is that of the majority of the pair's rows. If they tie, the pair is dropped.
    """
    votes: dict[Case, list[bool]] = defaultdict(list)
    for row in rows:
        question = known.get(normalise(row.case.question), row.case)
        votes[replace(question, answer=row.case.answer)].append(row.yes)
    mean = {case: sum(labels) / len(labels) for case, labels in votes.items()}
    order = sorted(mean, key=lambda case: (normalise(case.question), case.answer))
    return [LabelledAnswer(case, mean[case] > 0.5) for case in order if mean[case] != 0.5]


def unseen(judge: Judge, rows: Sequence[LabelledAnswer], path: Path) -> list[LabelledAnswer]:
    """The answers to held-out questions, on which the judge was not fitted.

    If the judge does not know what it was fitted on (it is not `Fitted`), these are all answers. Raises `DataError` if
    no question is held out, or if the judge needs references and too many questions have none.
    """
    questions = {row.case.question: bool(row.case.true or row.case.false) for row in rows}
    unknown = [question for question, has_references in questions.items() if not has_references]
    if judge.uses_references and len(unknown) > MAX_UNKNOWN * len(questions):
        raise DataError(
            got=f"{len(unknown)} of {len(questions)} questions of {path} without references ({unknown[0]!r:.80})",
            expected="reference answers to the judged questions",
            remedy="give the file with the reference answers to these questions",
        )
    seen = {question for question in questions if isinstance(judge, Fitted) and judge.saw(question)}
    if len(seen) == len(questions):
        raise DataError(
            got=f"{path}, in which {judge.name} was fitted on every question",
            expected="answers to held-out questions",
            remedy="give other labelled answers",
        )
    return [row for row in rows if row.case.question not in seen]


def judged(judge: Judge, rows: Sequence[LabelledAnswer], say: Callable[[str], None]) -> Float[np.ndarray, " n"]:
    """P(yes) of each answer; NaN if the judgement is missing. `say` receives progress messages."""
    said: list[float | None] = []
    for start in range(0, len(rows), CHUNK):
        said += [judgement.probability for judgement in judge.score([row.case for row in rows[start : start + CHUNK]])]
        say(f"{judge.name}: {len(said)} of {len(rows)} answers")
    return np.array(said, dtype=float)


def is_reference(case: Case) -> bool:
    """Whether the answer equals a reference of its question after normalisation."""
    return normalise(case.answer) in map(normalise, case.true + case.false)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def measure(
    p: Float[np.ndarray, " n"], yes: Bool[np.ndarray, " n"], questions: np.ndarray, *, seed: int = 0
) -> dict[str, Any]:
    r"""Compare p = P(yes) with the labels; a verdict is yes if p >= 0.5. Returns plain numbers, None if undefined.

    - ``majority``: accuracy of always giving the more frequent label.
    - ``accuracy``, and ``accuracy_95``: its percentile bootstrap interval over questions, if there are several.
    - ``balanced_accuracy``: mean of sensitivity and specificity.
    - ``brier``: mean of (p - label)^2.
    - ``ece``: expected calibration error. It is the mean over answers of ``|share of yes - mean p|``, computed in the
      bin of p that the answer is in.
    - ``auc``: area under the ROC curve (Mann-Whitney statistic, ties count half).
    - ``n``, ``n_questions``: number of judged answers and of their questions.
    - ``missing``: number of missing judgements, which do not count in the other values.

    `questions` has the question of each answer. Raises `DataError` for a p outside [0, 1].
    """
    there = ~np.isnan(p)
    # The labels act as a second judge whose verdicts are right, so that agreement with it is accuracy.
    said = [x if known else None for x, known in zip(p.tolist(), there.tolist(), strict=True)]
    found = compare(said, yes.astype(float).tolist(), questions.tolist(), seed=seed)
    counts = {"n": found.n, "missing": found.missing[0], "n_questions": found.n_groups}
    if not found.n:
        return counts
    p, yes = p[there], yes[there]
    (right_no, _), (_, right_yes) = found.counts
    n_yes = int(yes.sum())
    n_no = found.n - n_yes
    has_both = n_yes > 0 and n_no > 0
    bins = np.minimum((p * N_BINS).astype(int), N_BINS - 1)
    return counts | {
        "majority": max(n_yes, n_no) / found.n,
        "accuracy": found.agreement,
        "accuracy_95": list(found.agreement_interval) if found.n_groups > 1 else None,
        "balanced_accuracy": (right_yes / n_yes + right_no / n_no) / 2 if has_both else None,
        "brier": float(np.mean((p - yes) ** 2)),
        "ece": float(np.abs(np.bincount(bins, weights=yes - p)).sum() / found.n),
        "auc": float(mannwhitneyu(p[yes], p[~yes]).statistic / (n_yes * n_no)) if has_both else None,
    }


def as_table(report: Mapping[str, Any]) -> str:
    """The measures of `validate` as a Markdown table."""
    keys = ("n", "missing", "majority", "accuracy", "accuracy_95", "balanced_accuracy", "brier", "ece", "auc")
    lines = [f"| aspect | answers | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for aspect, found in report["aspects"].items():
        for part in ("non_reference", "reference", "all"):
            cells = " | ".join(cell(found[part].get(key)) for key in keys)
            lines.append(f"| {aspect} | {part} | {cells} |")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A measure as text, with three digits."""
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
