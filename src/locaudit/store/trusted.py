"""Trusted labels of a run's answers: draw the answers to label, read the labels, and correct judged scores by them.

`locaudit.stats.ppi` has the estimates. Answers are compared after collapsing white space, which spreadsheets change.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from locaudit.config.files import read_bytes
from locaudit.errors import DataError
from locaudit.records import NO_METHOD, Place, TrialRecord, content_hash
from locaudit.registry import ASPECTS
from locaudit.stats.agreement import Agreement, compare
from locaudit.stats.intervals import mean_estimate, pseudo_values
from locaudit.stats.phrases import where
from locaudit.stats.ppi import LEAST, RectifiedMean, rectified_mean, rectify
from locaudit.stats.scores import components, score_values, tolerance
from locaudit.stats.selection import BASE, CLAIM, WHOLE, select
from locaudit.text import plural

if TYPE_CHECKING:
    from locaudit.store.run import Run

Arm = tuple[str, Place]
"""(method, place) of a chosen edit; the unedited model is (`NO_METHOD`, `BASE`)."""
_MARKS: Mapping[Any, float] = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}
_DESIGN = "{m} of {n} questions, {rows} answers, {key}"
_HOW = {
    "design": "drawn by `locaudit judge sample`, with known probabilities",
    "probability": "with the probabilities in the file's column",
    "": "assumed to be drawn at random: in each arm, any answer with the same probability",
}


@dataclass(frozen=True)
class Labelled:
    """A row of a file of labels."""

    question: str
    """Id of the question."""
    answer: str
    labels: Mapping[str, float]
    """Aspect -> 1 (the answer has the quality) or 0; aspects left empty are missing."""
    probability: float | None = None
    """The probability with which this answer was chosen to be labelled; None if the file does not say."""
    design: str = ""
    """The sampling design, as `draw` wrote it; empty if the answers were chosen in another way."""


@dataclass(frozen=True)
class Line:
    """A mean, or a difference of means, by the judge alone and corrected by labels."""

    method: str
    what: str
    """``unedited``, ``claim``, ``whole model``, ``mean control``, ``gain`` or ``lead``. Controls and lead of another
    null than ``anywhere`` say so, as in ``lead in its layers``."""
    score: str
    """The verdict's score, or an aspect."""
    judged: float
    judged_interval: tuple[float, float]
    """95 % interval over questions, which takes the judge to be right."""
    corrected: RectifiedMean
    """NaN if fewer than `LEAST` questions are labelled; the interval is NaN if all labels are equal, too."""


@dataclass(frozen=True)
class Corrected:
    """A run's scores corrected by trusted labels."""

    file: str
    n_labels: int
    """Number of labelled answers."""
    how: str
    """How the labelled answers were chosen, or what is assumed about it."""
    agreement: Mapping[str, Agreement]
    """Aspect -> agreement of the judge with the labels."""
    lines: tuple[Line, ...]
    least: int = LEAST
    """Number of labelled questions that a corrected number needs."""


def read_labels(path: str | Path, aspects: Collection[str] = ()) -> tuple[Labelled, ...]:
    """Read labels from a CSV file or, with the suffix ``.jsonl``, from JSON objects, one a line.

    Columns: ``question_id``, ``answer``, one per labelled aspect with 0, 1 or nothing, and optionally ``probability``
    or ``design``. Raises `DataError` for anything else. `aspects` are those that the run judges (empty: not known); the
    error about a file without labels names them.
    """
    path = Path(path)
    text = read_bytes(path, "a CSV or JSONL file of labels", DataError).decode("utf-8-sig", "replace")
    rows, seen = [], set()
    for place, values in _raw_rows(path, text):
        row = _labelled(place, values)
        if (row.question, row.answer) in seen:
            raise _wrong(place, f"a second row for question {row.question}, answer {row.answer!r:.60}", "delete one")
        seen.add((row.question, row.answer))
        rows.append(row)
    if not any(row.labels for row in rows):
        raise _wrong(str(path), "no label", f"fill in a column of an aspect: {', '.join(aspects or ASPECTS)}")
    if len({(row.probability is None, row.design) for row in rows}) > 1:
        raise _wrong(str(path), "rows of several samples, or some without a probability", "give the rows of one sample")
    return tuple(rows)


def _raw_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    found = json.loads(line)
                except ValueError:
                    found = None
                if not isinstance(found, dict):
                    raise _wrong(f"{path}, line {number}", "no JSON object", "write one object a line")
                texts = {None: "", True: "1", False: "0"}
                yield (
                    f"{path}, line {number}",
                    {key: texts[x] if x is None or isinstance(x, bool) else str(x) for key, x in found.items()},
                )
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for values in reader:
            yield f"{path}, line {reader.line_num}", {key: value or "" for key, value in values.items() if key}


def _labelled(where: str, values: Mapping[str, str]) -> Labelled:
    if "question_id" not in values or "answer" not in values:
        raise _wrong(where, f"the columns {', '.join(values)}", "name the columns question_id and answer")
    given = {name: values[name].strip() for name in ASPECTS if values.get(name, "").strip()}
    for name, mark in given.items():
        if mark not in _MARKS:
            raise _wrong(
                where, f"{name} = {mark!r:.40}", "write 1 (yes), 0 (no), or nothing for an answer not labelled"
            )
    try:
        probability = float(values["probability"]) if values.get("probability", "").strip() else None
    except ValueError:
        probability = math.nan
    if probability is not None and not 0 < probability <= 1:
        raise _wrong(where, f"probability = {values['probability']!r:.40}", "write a number above 0, at most 1")
    design = values.get("design", "").strip()
    if design and probability is not None:
        raise _wrong(
            where,
            "both a design and a probability, which contradict each other",
            "delete the column probability if `locaudit judge sample` drew the answers, else the column design",
        )
    labels = {name: _MARKS[mark] for name, mark in given.items()}
    return Labelled(values["question_id"], _words(values["answer"]), labels, probability, design)


def _wrong(where: str, problem: str, remedy: str) -> DataError:
    return DataError(got=f"{where}: {problem}", expected="labels of a run's answers", remedy=remedy)


def _words(answer: str) -> str:
    return " ".join(answer.split())


@dataclass(frozen=True, eq=False)
class Frame:
    """The answers that labels are wanted for: of the chosen edits and the unedited model, to test questions."""

    ids: tuple[str, ...]
    """Ids of the test questions."""
    records: Mapping[Arm, TrialRecord]
    """Arm -> its chosen trial, which has answers."""

    @cached_property
    def answers(self) -> Mapping[tuple[Arm, int], tuple[str, ...]]:
        """(arm, sample) -> its answers, one per question; all arms have the same samples."""
        said = {arm: _answers(record) for arm, record in self.records.items()}
        # Scores count as many samples as every chosen trial has (`Run.records`).
        fewest = min(map(len, said.values()))
        return {(arm, k): answers[k] for arm, answers in said.items() for k in range(fewest)}

    @cached_property
    def samples(self) -> range:
        """Numbers of the samples."""
        return range(1 + max(k for _, k in self.answers))

    @cached_property
    def groups(self) -> Mapping[tuple[str, str, str], tuple[Arm, ...]]:
        """(method, kind of arm, null) -> its arms: all controls of one null, or one other arm."""
        kinds = dict.fromkeys((method, place.arm, place.null) for method, place in self.records)
        return {kind: tuple(arm for arm in self.records if (arm[0], arm[1].arm, arm[1].null) == kind) for kind in kinds}

    @cached_property
    def inclusion(self) -> tuple[Mapping[str, float], ...]:
        """For each question, answer -> probability that it is labelled if the question is drawn.

        A sample is drawn, the same for all arms, and one arm of each group.
        """
        found: list[dict[str, float]] = [defaultdict(float) for _ in self.ids]
        for i, odds in enumerate(found):
            for k in self.samples:
                missed: dict[str, float] = {}
                for arms in self.groups.values():
                    for answer, n in Counter(_words(self.answers[arm, k][i]) for arm in arms).items():
                        missed[answer] = missed.get(answer, 1.0) * (1 - n / len(arms))
                for answer, share in missed.items():
                    odds[answer] += (1 - share) / len(self.samples)
        return tuple(found)

    @property
    def key(self) -> str:
        """Hash of the trials, questions and number of samples: labels of a sample are for these only."""
        trials = sorted(record.spec.trial_id for record in self.records.values())
        return content_hash([trials, self.ids, len(self.samples)])


def _answers(record: TrialRecord) -> tuple[tuple[str, ...], ...]:
    """The answers to test questions that the verdict's score is computed from, by sample."""
    return record.samples.get("test") or (record.answers["test"],)


def frame_of(run: Run) -> Frame:
    """The run's answers that labels are wanted for. Raises `DataError` if none were generated."""
    chosen = select(run.records, run.score, tolerance(run.score, run.manifest.dtype))
    records = {
        (method, place): record
        for method, places in chosen.items()
        for place, record in places.items()
        if record is not None and place.arm not in ("rest", "placebo") and record.answers.get("test")
    }
    if (NO_METHOD, BASE) not in records:
        raise DataError(
            got=f"{run.folder}, a run without answers",
            expected="a run that generated answers (evaluation.max_new_tokens above 0)",
            remedy="run the audit into the same folder again with evaluation.max_new_tokens = 50, which adds answers",
        )
    return Frame(tuple(question.id for question in run.questions["test"]), records)


def draw(run: Run, n: int, seed: int = 0) -> tuple[list[dict[str, str]], str]:
    """Draw about `n` answers to label, and describe the sample in a sentence.

    Test questions are drawn at random, all with the same probability. Of each, the answers of the unedited model, the
    claim, the whole model and one random control of each method and null are taken, because differences between arms at
    the same question are what a verdict compares. Rows do not show which arm said what: each distinct answer comes
    once, in random order.
    """
    frame, rng = frame_of(run), np.random.default_rng(seed)
    per_question = fmean(sum(odds.values()) for odds in frame.inclusion)
    m = min(len(frame.ids), max(1, round(n / per_question)))
    texts = {question.id: question.text for question in run.questions["test"]}
    found: list[tuple[str, str]] = []
    for i in rng.permutation(len(frame.ids))[:m]:
        k = rng.choice(frame.samples)
        arms = [group[rng.integers(len(group))] for group in frame.groups.values()]
        found += dict.fromkeys((frame.ids[i], _words(frame.answers[arm, k][i])) for arm in arms)
    design = _DESIGN.format(m=m, n=len(frame.ids), rows=len(found), key=frame.key)
    rows = [
        {"question_id": id_, "question": texts[id_], "answer": answer}
        | dict.fromkeys(run.manifest.judges or run.manifest.aspects, "")
        | {"design": design}
        for id_, answer in (found[k] for k in rng.permutation(len(found)))
    ]
    remedy = "raise --n" if m < len(frame.ids) else "raise split.max_test and run the audit again"
    more = "" if m >= LEAST else f"; a corrected number takes at least {LEAST} questions: {remedy}"
    return rows, f"{plural(len(rows), 'answer')} to {m} of {len(frame.ids)} test questions{more}"


def correct(run: Run, file: str, rows: Sequence[Labelled]) -> Corrected:
    """The judged scores of a run's arms and their differences, corrected by labels.

    Raises `DataError` for a row that is no answer of the run, and for a sample that was drawn for other trials.
    """
    frame, table = frame_of(run), {(row.question, row.answer): row for row in rows}
    said = {(question, _words(answer)): (question, answer) for question, answer in sorted(run.said)}
    strange = [key for key in table if key not in said]
    if strange:
        raise _wrong(
            file,
            f"{len(strange)} of {len(rows)} rows that are no answer of {run.folder} (first: question {strange[0][0]}, "
            f"{strange[0][1]!r:.80})",
            "give the labels of this run's answers, unchanged but for white space",
        )
    aspects = [aspect for aspect in run.judgements if any(aspect in row.labels for row in rows)]
    if not aspects:
        raise _wrong(file, f"labels of other aspects than {' and '.join(run.judgements) or 'none'}, which the run's "
                     "judges rate", "label one of these, or add a judge and run the audit again")  # fmt: skip
    weighing = _Weighing(run, frame, table, _design(run, frame, rows))
    agreement = {
        aspect: compare(
            [run.judgements[aspect].get(said[key], (None, ""))[0] for key in has],
            [table[key].labels[aspect] for key in has],
            [question for question, _ in has],
        )
        for aspect in aspects
        if (has := [k for k, row in table.items() if aspect in row.labels and said[k] in run.judgements[aspect]])
    }
    how = _HOW["design" if weighing.design else "probability" if rows[0].probability is not None else ""]
    measured = {aspect: weighing.weigh(aspect) for aspect in aspects}
    lines = [
        _line(frame, score, measured, method, what, c)
        for score in dict.fromkeys([run.score, *aspects])
        for method, what, c in _contrasts(frame)
        if {name.removesuffix("_probability") for name in components(score, run.base.questions["test"])} <= set(aspects)
    ]
    return Corrected(file, sum(bool(row.labels) for row in rows), how, agreement, tuple(lines))


def _design(run: Run, frame: Frame, rows: Sequence[Labelled]) -> tuple[float, int] | None:
    """(share of the questions drawn, number of answers drawn) of a sample by `draw`; None for other labels."""
    if not rows[0].design:
        return None
    found = re.fullmatch(r"(\d+) of (\d+) questions, (\d+) answers, (\w+)", rows[0].design)
    if found is None or found[4] != frame.key:
        raise DataError(
            got=f"labels of a sample ({rows[0].design!r:.80}) drawn for other edits or questions of {run.folder}",
            expected="a sample of this run as it is now, read with the score that it was drawn with",
            remedy="draw a new sample with `locaudit judge sample`; labels of equal answers can be copied into it",
        )
    return int(found[1]) / int(found[2]), int(found[3])


@dataclass(frozen=True, eq=False)
class _Weighing:
    run: Run
    frame: Frame
    table: Mapping[tuple[str, str], Labelled]
    design: tuple[float, int] | None

    def weigh(self, aspect: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Judgements f, labels y and weights w of an aspect, (answers of an arm, questions) each: `stats.ppi`."""
        frame = self.frame
        judged = self.run.judgements[aspect]
        f = np.full((len(frame.answers), len(frame.ids)), np.nan)
        y, w = np.zeros_like(f), np.zeros_like(f)
        n_rows = len(self.table) if self.design is None else self.design[1]
        # Rows that were left empty count as missing at random.
        filled = sum(aspect in row.labels for row in self.table.values()) / n_rows
        for a, said in enumerate(frame.answers.values()):
            for i, key in enumerate(zip(frame.ids, said, strict=True)):
                probability = judged.get(key, (None, ""))[0]
                f[a, i] = np.nan if probability is None else probability
                row = self.table.get((key[0], _words(key[1])))
                if row is None or aspect not in row.labels:
                    continue
                y[a, i], odds = row.labels[aspect], row.probability or 1.0
                if self.design is not None:
                    odds = self.design[0] * frame.inclusion[i][_words(key[1])]
                w[a, i] = 1 / (odds * filled)
        if self.design is None and next(iter(self.table.values())).probability is None:
            # The probability is the share that is labelled: of an arm, or of all controls of a null together.
            for group in frame.groups.values():
                arms = [a for a, (arm, _) in enumerate(frame.answers) if arm in group]
                has = w[arms] > 0
                w[arms] = np.where(has, 1 / max(has.mean(), 1e-9), 0.0)
        return f, y, w


def _contrasts(frame: Frame) -> Iterator[tuple[str, str, dict[Arm, float]]]:
    """(method, what is estimated, weight of each arm that counts)."""
    arms = list(frame.records)

    def at(*chosen: Arm) -> dict[Arm, float]:
        """The mean of these arms."""
        return {arm: 1 / len(chosen) for arm in chosen}

    def minus(one: Mapping[Arm, float], other: Mapping[Arm, float]) -> dict[Arm, float]:
        return {**one, **{arm: -x for arm, x in other.items()}}

    base = at((NO_METHOD, BASE))
    yield NO_METHOD, "unedited", base
    for method in dict.fromkeys(method for method, _ in arms if method != NO_METHOD):
        claim, whole = (method, CLAIM), (method, WHOLE)
        controls = {null: group for (m, arm, null), group in frame.groups.items() if (m, arm) == (method, "control")}
        if claim in arms:
            yield method, "claim", at(claim)
        if whole in arms:
            yield method, "whole model", at(whole)
        for null, group in controls.items():
            yield method, f"mean control{where(null)}", at(*group)
        if claim in arms:
            yield method, "gain", minus(at(claim), base)
        for null, group in controls.items() if claim in arms else ():
            yield method, f"lead{where(null)}", minus(at(claim), at(*group))


def _line(
    frame: Frame, score: str, measured: Mapping[str, Any], method: str, what: str, weights: Mapping[Arm, float]
) -> Line:
    arms, samples = [arm for arm in frame.records if arm in weights], len(frame.samples)
    c, records = np.array([weights[arm] for arm in arms]), [frame.records[arm].questions["test"] for arm in arms]
    values = np.stack([score_values(questions, score) for questions in records], axis=1)
    judged = mean_estimate(c @ pseudo_values(values), (-math.inf, math.inf))
    used = [a for a, (arm, _) in enumerate(frame.answers) if arm in arms]
    names = [name.removesuffix("_probability") for name in components(score, records[0])]
    parts = [[x[used] for x in measured[name]] for name in names]
    each = np.repeat(c, samples) / samples  # of each answer, in the order of `used`
    psi = [rectify(f, y, w, each).reshape(len(arms), samples, -1).mean(axis=1) for f, y, w in parts]
    labelled = np.min([w for _, _, w in parts], axis=0).reshape(len(arms), samples, -1).max(axis=1)
    found = rectified_mean(psi, labelled, c)
    unknown = (math.nan, math.nan)
    if found.n < LEAST:
        found = RectifiedMean(math.nan, math.nan, found.n, unknown)
    elif found.se == 0:
        found = RectifiedMean(found.value, math.nan, found.n, unknown)
    return Line(method, what, score, judged.value, judged.interval(), found)
