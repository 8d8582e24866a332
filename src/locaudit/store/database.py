"""The database of a run: fits, measurements, questions, judgements, manifest. A group of trials is one transaction.

A fit gives an edit; a measurement is a value of an edit at a question. Both are found by what they depend on, so that a
run can grow in controls, questions, judges or scores and only what is missing runs.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from locaudit.config import AuditConfig, to_yaml
from locaudit.errors import RunFolderError
from locaudit.location import Location
from locaudit.records import TrialRecord, TrialSpec, mean_metrics
from locaudit.store.files import MIN_FREE_BYTES, no_room, write_atomically
from locaudit.store.manifest import Manifest, read_manifest, write_manifest

SCHEMA = """
CREATE TABLE IF NOT EXISTS fits (
    fit TEXT PRIMARY KEY, method TEXT NOT NULL, location TEXT NOT NULL, strength, seed INTEGER NOT NULL,
    draw INTEGER, context TEXT NOT NULL, status TEXT NOT NULL, message TEXT NOT NULL, training TEXT NOT NULL,
    edit TEXT NOT NULL, drift TEXT NOT NULL, seconds REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS places (
    arm TEXT NOT NULL, control INTEGER NOT NULL, fit TEXT NOT NULL REFERENCES fits(fit), registration TEXT NOT NULL,
    PRIMARY KEY (arm, control, fit)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS questions (
    split TEXT NOT NULL, position INTEGER NOT NULL, question TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL,
    true_answers TEXT NOT NULL, false_answers TEXT NOT NULL, PRIMARY KEY (split, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    fit TEXT NOT NULL REFERENCES fits(fit), question TEXT NOT NULL, metric TEXT NOT NULL, value,
    PRIMARY KEY (fit, question, metric)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    fit TEXT NOT NULL REFERENCES fits(fit), question TEXT NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY (fit, question)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judgements (
    judge TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, probability REAL, reason TEXT NOT NULL,
    PRIMARY KEY (judge, question, answer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS manifest (value TEXT NOT NULL);
"""
"""Strengths and values have no declared type: SQLite writes the -0.0 of a REAL column as 0.0."""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question as a run keeps it, to be shown and judged."""

    id: str
    text: str
    true: tuple[str, ...]
    false: tuple[str, ...]
    key: str = ""
    """Hash of its prompt and answers as token ids: what a measurement is found by."""


@dataclass(frozen=True)
class Kept:
    """What there is of a trial that is not whole, as after questions were added."""

    record: TrialRecord
    """Without scores and answers."""
    scores: Mapping[str, Mapping[str, float]]
    """Question's key -> metric -> value."""
    answers: Mapping[str, str]
    """Question's key -> answer."""


Keys = Mapping[str, Sequence[str]]
"""Split -> keys of its questions, in order."""


class Store:
    """An open run folder. Use `open_run` (to write, one process at a time) or `read_run` (to read)."""

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
        """Folder of what all trials share."""
        return self.folder / "cache"

    @property
    def manifest(self) -> Manifest | None:
        """What the run says about itself; None for one that has not come so far."""
        row = self._connection.execute("SELECT value FROM manifest").fetchone()
        return None if row is None else read_manifest(row[0])

    def write_manifest(self, manifest: Manifest) -> None:
        """Keep the manifest, in place of an earlier one, and the settings that it is of."""
        write_atomically(self.folder / "config.yaml", to_yaml(self.config).encode())
        with self._writing():
            self._connection.execute("DELETE FROM manifest")
            self._connection.execute("INSERT INTO manifest VALUES (?)", (write_manifest(manifest),))

    def done(self) -> set[str]:
        """Ids of the trials with a record."""
        return {record.spec.trial_id for record in self.records()}

    def contexts(self) -> set[str]:
        """What the edits of its trials depend on besides the trial (`locaudit.run.plan.fit_context`)."""
        return {context for (context,) in self._connection.execute("SELECT DISTINCT context FROM fits")}

    def is_empty(self) -> bool:
        """Whether no trial has ended yet."""
        return self._connection.execute("SELECT 1 FROM places LIMIT 1").fetchone() is None

    def records(self) -> list[TrialRecord]:
        """All trials with their scores on the present questions, ordered by trial id.

        One that is not whole is left out: it lacks some questions of a split that it was scored on, as after questions
        were added, or answers, where the settings want them.
        """
        return [found for found in self._read(self._keys()) if isinstance(found, TrialRecord)]

    def kept(self, keys: Keys) -> dict[str, Kept]:
        """What there is of trials that would not be whole with these questions, by trial id."""
        parts = (found for found in self._read(keys) if isinstance(found, Kept))
        return {part.record.spec.trial_id: part for part in parts}

    def _keys(self) -> Keys:
        return {split: [q.key for q in self.questions(split)] for split in ("val", "test")}

    def _read(self, keys: Keys) -> Iterator[TrialRecord | Kept]:
        values: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        for fit, question, metric, value in self._connection.execute("SELECT * FROM scores"):
            values[fit][question][metric] = math.nan if value is None else value
        said: dict[str, dict[str, str]] = defaultdict(dict)
        for fit, question, answer in self._connection.execute("SELECT * FROM answers"):
            said[fit][question] = answer
        rows = self._connection.execute(
            "SELECT arm, control, registration, fits.* FROM places JOIN fits USING (fit) ORDER BY fit, arm, control"
        )
        generates = bool(self.config.evaluation.max_new_tokens)
        for row in rows:
            kept = Kept(_unscored(row), values[row[3]], said[row[3]])
            yield _whole(kept, keys, generates) or kept

    def add(self, records: Sequence[TrialRecord], seconds: float) -> None:
        """Write what trials that ran together left, all or nothing; `seconds` is shared out evenly.

        Of a trial that has a fit already, what is new is added; an edit that diverges on new questions keeps no scores.
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
            "INSERT OR IGNORE INTO places VALUES (?, ?, ?, ?)", (spec.arm, spec.control, fit, spec.registration)
        )
        if record.status == "diverged":
            for table in ("scores", "answers"):
                self._connection.execute(f"DELETE FROM {table} WHERE fit = ?", (fit,))
        scores = [
            (fit, key, metric, None if value != value else value)
            for split, metrics in record.questions.items()
            for metric, values in metrics.items()
            for key, value in zip(keys[split], values, strict=True)
        ]
        self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", scores)
        answers = [
            (fit, key, answer)
            for split, texts in record.answers.items()
            for key, answer in zip(keys[split], texts, strict=True)
        ]
        self._connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", answers)

    def set_questions(self, splits: Mapping[str, Sequence[HeldOutQuestion]]) -> None:
        """Keep the words of the questions that trials are scored on, in order."""
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
        """The questions of a split, in order; none for a run that has not come so far."""
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
        """(question id, answer) -> (probability or None, why it is missing), by the judge of that fingerprint.

        Of these answers only, unless None: a run that has judged many looks up a few after each trial.
        """
        ask = "SELECT question, answer, probability, reason FROM judgements WHERE judge = ?"
        if answers is None:
            rows = self._connection.execute(ask, (judge,)).fetchall()
        else:
            one = f"{ask} AND question = ? AND answer = ?"
            rows = [row for key in answers for row in self._connection.execute(one, (judge, *key))]
        return {(question, answer): (probability, reason) for question, answer, probability, reason in rows}

    def add_judgements(self, judge: str, found: Mapping[tuple[str, str], tuple[float | None, str]]) -> None:
        """Write judgements, all or none, replacing earlier ones (of the same judge: a missing one)."""
        self.check_room()
        with self._writing():
            self._connection.executemany(
                "INSERT OR REPLACE INTO judgements VALUES (?, ?, ?, ?, ?)",
                [(judge, *key, *value) for key, value in found.items()],
            )

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds of each trial, by id."""
        return dict(self._connection.execute("SELECT fit, seconds FROM fits").fetchall())

    def check_room(self) -> None:
        """Raise `RunFolderError` when the disk is nearly full; what is already written stays."""
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
    """A trial without its scores, from its row: place, then fit."""
    (arm, control, registration, fit, method, where, strength, seed, draw, context, status, message, training, edit,
     drift, _) = row  # fmt: skip
    spec = TrialSpec(
        arm, method, Location.from_json(json.loads(where)), strength, seed, context, control, draw, registration
    )
    assert spec.trial_id == fit
    losses = {name: tuple(x) for name, x in json.loads(training).items()}
    return TrialRecord(spec, status, message, drift=json.loads(drift), training=losses, edit=edit)


def _whole(kept: Kept, keys: Keys, generates: bool) -> TrialRecord | None:
    """The trial with its scores and answers; None if a split that it was scored on lacks some."""
    if kept.record.status == "diverged":
        return kept.record
    splits = [split for split, wanted in keys.items() if any(key in kept.scores for key in wanted)]
    wanted = {key for split in splits for key in keys[split]}
    if not wanted or not wanted <= kept.scores.keys() or (generates and not wanted <= kept.answers.keys()):
        return None
    return join(kept, {split: keys[split] for split in splits})


def join(kept: Kept, keys: Keys) -> TrialRecord:
    """A trial's record with its scores on these questions, each of which has some, and its answers if all have one."""
    questions: dict[str, dict[str, tuple[float, ...]]] = {}
    answers: dict[str, tuple[str, ...]] = {}
    for split, wanted in keys.items():
        found = [kept.scores[key] for key in wanted]
        # A score that a plug-in has added since is not known of the first questions.
        metrics = [name for name in found[0] if all(name in one for one in found)]
        questions[split] = {name: tuple(one[name] for one in found) for name in metrics}
        if all(key in kept.answers for key in wanted):
            answers[split] = tuple(kept.answers[key] for key in wanted)
    return replace(kept.record, metrics=mean_metrics(questions), questions=questions, answers=answers)


def connect(path: Path) -> sqlite3.Connection:
    """Open the database; a damaged one raises `RunFolderError`."""
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
