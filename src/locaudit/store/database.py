"""The database of a run: fits, scores, answers, questions, judgements and the manifest.

A *fit* finds an edit; a *measurement* is a score of an edit on one question, or an answer to it. Fits are stored under
a hash of what determines the edit (`TrialSpec.trial_id`), measurements under the fit and a hash of the question's
tokens, answers also under the number of the sample. None of these depends on how many controls, questions, samples or
judges there are. When one of these numbers is raised, everything stored stays valid and only what is missing runs.

A trial is therefore *whole* or *partial* only relative to the present questions. When questions are added, the trials
scored on their split become partial: `Store.records` leaves them out, `Store.kept` returns what is stored of them, and
the worker measures the rest. Trials that ran together are stored in one transaction.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from locaudit.config import AuditConfig, to_yaml
from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.records import OFF, Packed, TrialRecord, TrialSpec, content_hash, mean_metrics
from locaudit.store.files import MIN_FREE_BYTES, no_room, write_atomically
from locaudit.store.manifest import Manifest, read_manifest, write_manifest

SCHEMA = """
PRAGMA page_size = 16384; -- of new files: scores at hundreds of questions then lie in one page
CREATE TABLE IF NOT EXISTS fits (
    fit TEXT PRIMARY KEY, method TEXT NOT NULL, location TEXT NOT NULL, strength, seed INTEGER NOT NULL,
    draw INTEGER, context TEXT NOT NULL, status TEXT NOT NULL, message TEXT NOT NULL, training TEXT NOT NULL,
    edit TEXT NOT NULL, drift TEXT NOT NULL, seconds REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS places (
    arm TEXT NOT NULL, null_name TEXT NOT NULL, control INTEGER NOT NULL, fit TEXT NOT NULL REFERENCES fits(fit),
    registration TEXT NOT NULL, PRIMARY KEY (arm, null_name, control, fit)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS questions (
    split TEXT NOT NULL, position INTEGER NOT NULL, question TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL,
    true_answers TEXT NOT NULL, false_answers TEXT NOT NULL, PRIMARY KEY (split, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lists (list TEXT PRIMARY KEY, questions TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    fit TEXT NOT NULL REFERENCES fits(fit), list TEXT NOT NULL REFERENCES lists(list), metric TEXT NOT NULL,
    mean, packed BLOB NOT NULL, PRIMARY KEY (fit, list, metric)
);
CREATE TABLE IF NOT EXISTS answers (
    fit TEXT NOT NULL REFERENCES fits(fit), question TEXT NOT NULL, sample INTEGER NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY (fit, question, sample)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judgements (
    judge TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, probability REAL, reason TEXT NOT NULL,
    PRIMARY KEY (judge, question, answer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS parts (
    fit TEXT NOT NULL REFERENCES fits(fit), part TEXT NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (fit, part)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS manifest (value TEXT NOT NULL);
"""
"""The tables. ``places`` lists which arm, null and control each fit belongs to; a fit may have several places. Sample 0
is the greedy answer. ``scores`` has a row per fit, list of questions and metric, with all its values in one piece: a
row per value would take minutes to read if there are thousands of trials.

Strengths and means have no declared type, because SQLite would store -0.0 in a REAL column as 0.0.
"""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A held-out question as a run stores it, so that it can be shown and its answers judged."""

    id: str
    text: str
    true: tuple[str, ...]
    false: tuple[str, ...]
    key: str = ""
    """Hash of its prompt and answers as token ids; measurements are stored under it."""


def said_in(
    records: Iterable[TrialRecord], questions: Mapping[str, Sequence[HeldOutQuestion]]
) -> Iterator[tuple[str, str]]:
    """(question id, answer) of every answer of the records, greedy and sampled."""
    for record in records:
        for split in record.answers:
            for answers in record.said(split):
                yield from zip((question.id for question in questions[split]), answers, strict=True)


@dataclass(frozen=True)
class Kept:
    """What is stored of a trial that is partial, for example because questions were added later."""

    record: TrialRecord
    """The trial without scores and answers."""
    scores: Mapping[str, Mapping[str, float]]
    """Question key -> metric -> value."""
    answers: Mapping[tuple[str, int], str]
    """(question key, number of the sample; 0: greedy) -> generated answer."""


Keys = Mapping[str, Sequence[str]]
"""Split -> keys of its questions, in the split's order."""
Values = tuple[float, bytes]
"""The mean of a metric over a list of questions, and its value at each (`Packed.columns`)."""


class Store:
    """An open run folder. Made by `open_run` (for writing, one process at a time) and `read_run` (for reading)."""

    def __init__(self, folder: Path, config: AuditConfig, connection: sqlite3.Connection):
        self.folder = folder
        self.config = config
        self._connection = connection

    @property
    def edits(self) -> Path:
        """Folder of the saved edits."""
        return self.folder / "edits"

    @property
    def cache(self) -> Path:
        """Folder of the tensors that all trials share."""
        return self.folder / "cache"

    @property
    def manifest(self) -> Manifest | None:
        """The run's manifest; None if the run was stopped before it was written."""
        row = self._connection.execute("SELECT value FROM manifest").fetchone()
        return None if row is None else read_manifest(row[0])

    def write_manifest(self, manifest: Manifest) -> None:
        """Store the manifest in place of an earlier one, and write its settings to config.yaml."""
        write_atomically(self.folder / "config.yaml", to_yaml(self.config).encode())
        with self._writing():
            self._connection.execute("DELETE FROM manifest")
            self._connection.execute("INSERT INTO manifest VALUES (?)", (write_manifest(manifest),))

    def done(self) -> set[str]:
        """Ids of the trials that are whole."""
        return {record.spec.trial_id for record in self.records()}

    def contexts(self) -> set[str]:
        """The contexts of all fits: what they depend on besides the trial (`locaudit.run.plan.fit_context`)."""
        return {context for (context,) in self._connection.execute("SELECT DISTINCT context FROM fits")}

    def is_empty(self) -> bool:
        """Whether no trial is stored yet."""
        return self._connection.execute("SELECT 1 FROM places LIMIT 1").fetchone() is None

    def records(self) -> list[TrialRecord]:
        """All whole trials with their scores on the present questions, ordered by trial id.

        Partial trials are left out. They lack the scores of some questions of a split that they were scored on, or
        answers that the settings ask for.
        """
        return [found for found in self._read(self._keys()) if isinstance(found, TrialRecord)]

    def kept(self, keys: Keys) -> dict[str, Kept]:
        """Trial id -> what is stored of each trial that is partial with respect to these questions."""
        parts = (found for found in self._read(keys) if isinstance(found, Kept))
        return {part.record.spec.trial_id: part for part in parts}

    def _keys(self) -> Keys:
        return {split: [q.key for q in self.questions(split)] for split in self.splits}

    @property
    def splits(self) -> tuple[str, ...]:
        """``val``, ``test`` and the splits of off-target behaviours."""
        rows = self._connection.execute("SELECT DISTINCT split FROM questions")
        return ("val", "test", *sorted(name for (name,) in rows if name.startswith(OFF)))

    def _read(self, keys: Keys) -> Iterator[TrialRecord | Kept]:
        """All stored trials: as a record if whole with respect to `keys`, else as what is stored."""
        lists = {name: json.loads(text) for name, text in self._connection.execute("SELECT * FROM lists")}
        packed: dict[str, dict[str, dict[str, Values]]] = defaultdict(lambda: defaultdict(dict))
        for fit, name, metric, mean, values in self._connection.execute("SELECT * FROM scores"):
            packed[fit][name][metric] = math.nan if mean is None else mean, values  # SQLite has no NaN
        said: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)
        for fit, question, sample, answer in self._connection.execute("SELECT * FROM answers"):
            said[fit][question, sample] = answer
        rows = self._connection.execute(
            "SELECT arm, null_name, control, registration, fits.* FROM places JOIN fits USING (fit) "
            "ORDER BY fit, arm, null_name, control"
        )
        lay_out, samples = cache(partial(_lay_out, lists, keys)), self.config.evaluation.first_samples
        for row in rows:
            record, fit = _unscored(row), row[4]
            if record.status == "diverged":
                yield record
                continue
            scores = packed[fit]
            layout = lay_out(frozenset(scores))
            spoken = [part for split, part in layout.own.items() if not split.startswith(OFF)]
            is_whole = layout.is_scored and all(
                (key, n) in said[fit] for n in samples for part in spoken for key in part
            )
            if is_whole and all(name in scores for name in layout.lists.values()):
                own = {split: sorted(scores[name].items()) for split, name in layout.lists.items()}
                yield replace(
                    record,
                    metrics={split: {metric: mean for metric, (mean, _) in found} for split, found in own.items()},
                    questions={split: Packed({metric: x for metric, (_, x) in found}) for split, found in own.items()},
                    **_answered(said[fit], layout.own),
                )
            else:
                kept = Kept(record, _unpack(scores, lists), said[fit])
                yield join(kept, layout.own) if is_whole else kept

    def add(self, records: Sequence[TrialRecord], seconds: float) -> None:
        """Store, in one transaction, trials that ran together. Each is given an equal share of the run time, `seconds`.

        If a trial's fit is stored already, only new scores and answers are added. If its edit gave numbers that are not
        finite on new questions, the trial becomes diverged and its earlier scores and answers are deleted. Raises
        `RunFolderError` if the disk is nearly full.
        """
        self.check_room()
        keys = self._keys()
        with self._writing():
            for record in records:
                self._add(record, keys, seconds / len(records))

    def _add(self, record: TrialRecord, keys: Keys, seconds: float) -> None:
        spec, fit = record.spec, record.spec.trial_id
        where = json.dumps(None if spec.location is None else spec.location.to_json())
        self._connection.execute(
            "INSERT INTO fits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (fit) DO UPDATE SET status = excluded.status, message = excluded.message, "
            "edit = excluded.edit, drift = excluded.drift, seconds = seconds + excluded.seconds",
            (fit, spec.method, where, spec.hyperparameter, spec.seed, spec.draw, spec.context, record.status,
             record.message, json.dumps(record.training), record.edit, json.dumps(record.drift), seconds),
        )  # fmt: skip
        self._connection.execute(
            "INSERT OR IGNORE INTO places VALUES (?, ?, ?, ?, ?)",
            (spec.arm, spec.null, spec.control, fit, spec.registration),
        )
        self._add_parts(record)
        if record.status == "diverged":  # possibly on added questions only: then earlier ones have scores
            for table in ("scores", "answers"):
                self._connection.execute(f"DELETE FROM {table} WHERE fit = ?", (fit,))
        for split, metrics in record.questions.items():
            self._add_scores(fit, keys[split], metrics)
        answers = [
            (fit, key, sample, answer)
            for split in record.answers
            for sample, texts in enumerate(record.said(split))
            for key, answer in zip(keys[split], texts, strict=True)
        ]
        self._connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", answers)

    def _add_scores(self, fit: str, questions: Sequence[str], metrics: Mapping[str, Sequence[float]]) -> None:
        """Store the scores of a fit on a list of questions, in place of those on a part of the list."""
        if not questions:
            return
        ask = "SELECT DISTINCT list, questions FROM scores JOIN lists USING (list) WHERE fit = ?"
        for name, text in self._connection.execute(ask, (fit,)).fetchall():
            if set(json.loads(text)) < set(questions):
                self._connection.execute("DELETE FROM scores WHERE fit = ? AND list = ?", (fit, name))
        name, columns = content_hash([*questions]), Packed.of(metrics, len(questions)).columns
        self._connection.execute("INSERT OR IGNORE INTO lists VALUES (?, ?)", (name, json.dumps([*questions])))
        means = mean_metrics({"": metrics})[""]
        rows = [(fit, name, metric, mean, columns[metric]) for metric, mean in means.items()]
        self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?)", rows)

    def _add_parts(self, record: TrialRecord) -> None:
        self._connection.executemany(
            "INSERT INTO parts VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET seconds = seconds + excluded.seconds",
            [(record.spec.trial_id, part, seconds) for part, seconds in record.seconds.items()],
        )

    def add_judging(self, records: Sequence[TrialRecord], seconds: float) -> None:
        """Add the seconds that judging the new answers of these trials took to their answers' (`parts`)."""
        with self._writing():
            for record in records:
                part = "sample" if "sample" in record.seconds else "answer"
                self._add_parts(replace(record, seconds={part: seconds / len(records)}))

    def set_questions(self, splits: Mapping[str, Sequence[HeldOutQuestion]]) -> None:
        """Store the held-out questions that trials are scored on, in place of earlier ones."""
        with self._writing():
            self._connection.execute("DELETE FROM questions")
            self._connection.executemany(
                "INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (split, position, q.key, q.id, q.text, json.dumps(q.true), json.dumps(q.false))
                    for split, questions in splits.items()
                    for position, q in enumerate(questions)
                ],
            )

    def questions(self, split: str) -> list[HeldOutQuestion]:
        """The questions of a split, in order; empty if the run was stopped before they were stored."""
        rows = self._connection.execute(
            "SELECT id, text, true_answers, false_answers, question FROM questions WHERE split = ? ORDER BY position",
            (split,),
        )
        return [
            HeldOutQuestion(id_, text, tuple(json.loads(true)), tuple(json.loads(false)), key)
            for id_, text, true, false, key in rows
        ]

    def judgements(
        self, judge: str, answers: Collection[tuple[str, str]] | None = None
    ) -> dict[tuple[str, str], tuple[float | None, str]]:
        """Judgements by the judge with this fingerprint: (question id, answer) -> (probability, reason).

        The probability is None if the judgement is missing; the reason then says why. `answers` restricts the result to
        these (question id, answer) pairs, which is faster when only a few are needed.
        """
        ask = "SELECT question, answer, probability, reason FROM judgements WHERE judge = ?"
        if answers is None:
            rows = self._connection.execute(ask, (judge,)).fetchall()
        else:
            one = f"{ask} AND question = ? AND answer = ?"
            rows = [row for key in answers for row in self._connection.execute(one, (judge, *key))]
        return {(question, answer): (probability, reason) for question, answer, probability, reason in rows}

    def add_judgements(self, judge: str, found: Mapping[tuple[str, str], tuple[float | None, str]]) -> None:
        """Store judgements in one transaction. They replace earlier ones by the same judge, such as missing ones."""
        self.check_room()
        with self._writing():
            self._connection.executemany(
                "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?, ?)",
                [(judge, *key, *value) for key, value in found.items()],
            )

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each trial, by id."""
        return dict(self._connection.execute("SELECT fit, seconds FROM fits").fetchall())

    def parts(self) -> dict[str, dict[str, float]]:
        """Trial id -> part of its work -> seconds (`TrialRecord.seconds`), judging included."""
        found: dict[str, dict[str, float]] = defaultdict(dict)
        for fit, part, seconds in self._connection.execute("SELECT * FROM parts"):
            found[fit][part] = seconds
        return dict(found)

    def check_room(self) -> None:
        """Raise `RunFolderError` if the disk is nearly full. What is already written stays."""
        free = shutil.disk_usage(self.folder).free
        if free < MIN_FREE_BYTES:
            raise no_room(self.folder, free)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._connection:
                yield
        except sqlite3.OperationalError as error:
            if "full" in str(error) or "disk I/O" in str(error):
                raise no_room(self.folder, shutil.disk_usage(self.folder).free) from error
            raise


def _unscored(row: Sequence) -> TrialRecord:
    """A trial without its scores, from a row of ``places`` joined with ``fits``."""
    (arm, null, control, registration, fit, method, where, strength, seed, draw, context, status, message, training,
     edit, drift, _) = row  # fmt: skip
    spec = TrialSpec(arm, method, _location(where), strength, seed, context, control, draw, registration, null)
    assert spec.trial_id == fit
    losses = {name: tuple(x) for name, x in json.loads(training).items()}
    return TrialRecord(spec, status, message, drift=json.loads(drift), training=losses, edit=edit)


@lru_cache(maxsize=10_000)  # a location has a trial for each method and strength
def _location(text: str) -> Location | None:
    return Location.from_json(json.loads(text))


@dataclass(frozen=True)
class _Layout:
    """How the questions of a run lie in the lists on which a fit has scores."""

    own: Keys
    """The splits that the fit is scored on."""
    lists: Mapping[str, str]
    """Split -> the list with exactly its questions. A list may be missing in a run that grew."""
    is_scored: bool
    """Whether there is any question, and all of them have scores."""


def _lay_out(lists: Mapping[str, Sequence[str]], keys: Keys, stored: frozenset[str]) -> _Layout:
    known = {key for name in stored for key in lists[name]}
    # A method with one strength is scored on test only. Which splits count is thus read off from what has scores.
    own = {split: part for split, part in keys.items() if split.startswith(OFF) or not known.isdisjoint(part)}
    wanted = {key for part in own.values() for key in part}
    return _Layout(own, {split: content_hash([*part]) for split, part in own.items()}, bool(wanted) and wanted <= known)


def _unpack(scores: Mapping[str, Mapping[str, Values]], lists: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """Question key -> metric -> value, of the scores on each list of questions."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for name, metrics in scores.items():
        for metric, values in Packed({metric: x for metric, (_, x) in metrics.items()}).items():
            for key, value in zip(lists[name], values, strict=True):
                found[key][metric] = value
    return dict(found)


def join(kept: Kept, keys: Keys) -> TrialRecord:
    """The record of a trial on these questions, which must all have scores. A sample is included if it is complete."""
    questions: dict[str, dict[str, tuple[float, ...]]] = {}
    for split, wanted in keys.items():
        found = [kept.scores[key] for key in wanted]
        # Only metrics that every question has: a score that a plug-in added later is missing on the first questions.
        metrics = [name for name in found[0] if all(name in one for one in found)]
        questions[split] = {name: tuple(one[name] for one in found) for name in metrics}
    means = mean_metrics(questions)
    return replace(kept.record, metrics=means, questions=questions, **_answered(kept.answers, keys))


def _answered(found: Mapping[tuple[str, int], str], keys: Keys) -> dict[str, Any]:
    """The fields `answers` and `samples` of a record on these questions."""
    said = {
        split: tuple(
            tuple(found[key, sample] for key in wanted)
            for sample in takewhile(lambda n, wanted=wanted: all((key, n) in found for key in wanted), count())
        )
        for split, wanted in keys.items()
        if wanted
    }
    return {
        "answers": {split: rows[0] for split, rows in said.items() if rows},
        "samples": {split: rows[1:] for split, rows in said.items() if rows[1:]},
    }


def connect(path: Path) -> sqlite3.Connection:
    """Open the database. Raises `RunFolderError` if it is damaged."""
    connection = sqlite3.connect(path, timeout=30)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise RunFolderError(
            got=f"{path}, which is damaged or not an SQLite database ({error})",
            expected="the records of an earlier run",
            remedy="restore it from a copy, or choose another --out",
        ) from None
    return connection
