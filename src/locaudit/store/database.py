"""The database of a run: records, per-question scores, answers, judgements, timings, facts. A transaction a trial."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locaudit.config import AuditConfig
from locaudit.errors import RunFolderError
from locaudit.records import TrialRecord
from locaudit.store.files import MIN_FREE_BYTES, no_room

SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    trial_id TEXT PRIMARY KEY, arm TEXT NOT NULL, control INTEGER NOT NULL, method TEXT NOT NULL,
    hyperparameter REAL, location TEXT NOT NULL, status TEXT NOT NULL, record TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS scores (
    trial_id TEXT NOT NULL REFERENCES trials(trial_id), split TEXT NOT NULL, question TEXT NOT NULL,
    metric TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (trial_id, split, question, metric)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS questions (
    split TEXT NOT NULL, position INTEGER NOT NULL, question TEXT NOT NULL, text TEXT NOT NULL,
    true_answers TEXT NOT NULL, false_answers TEXT NOT NULL, PRIMARY KEY (split, position)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (
    trial_id TEXT NOT NULL REFERENCES trials(trial_id), split TEXT NOT NULL, question TEXT NOT NULL,
    answer TEXT NOT NULL, PRIMARY KEY (trial_id, split, question)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS judgements (
    judge TEXT NOT NULL, question TEXT NOT NULL, answer TEXT NOT NULL, probability REAL, reason TEXT NOT NULL,
    PRIMARY KEY (judge, question, answer)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS timings (trial_id TEXT PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question as a run keeps it, to be shown and judged."""

    id: str
    text: str
    true: tuple[str, ...]
    false: tuple[str, ...]


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

    def records(self) -> list[TrialRecord]:
        """All records, ordered by trial id."""
        rows = self._connection.execute("SELECT record FROM trials ORDER BY trial_id")
        return [TrialRecord.from_json(text) for (text,) in rows]

    def done(self) -> set[str]:
        """Ids of the trials that have a record."""
        return {trial_id for (trial_id,) in self._connection.execute("SELECT trial_id FROM trials")}

    def add(self, records: Sequence[TrialRecord], question_ids: Mapping[str, Sequence[str]], seconds: float) -> None:
        """Write the records of trials that ran together, all or none; `seconds` is shared out evenly."""
        self.check_room()
        with self._writing():
            for record in records:
                spec = record.spec
                self._connection.execute(
                    "INSERT INTO trials VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (spec.trial_id, spec.arm, spec.control, spec.method, spec.hyperparameter, spec.location,
                     record.status, record.to_json()),
                )  # fmt: skip
                self._connection.executemany(
                    "INSERT INTO scores VALUES (?, ?, ?, ?, ?)",
                    [
                        (spec.trial_id, split, question, metric, value)
                        for split, metrics in record.questions.items()
                        for metric, values in metrics.items()
                        for question, value in zip(question_ids[split], values, strict=True)
                    ],
                )
                self._connection.executemany(
                    "INSERT INTO answers VALUES (?, ?, ?, ?)",
                    [
                        (spec.trial_id, split, question, answer)
                        for split, answers in record.answers.items()
                        for question, answer in zip(question_ids[split], answers, strict=True)
                    ],
                )
                self._connection.execute("INSERT INTO timings VALUES (?, ?)", (spec.trial_id, seconds / len(records)))

    def set_questions(self, splits: Mapping[str, Sequence[HeldOutQuestion]]) -> None:
        """Keep the words of the questions that trials are scored on, in order."""
        with self._writing():
            self._connection.execute("DELETE FROM questions")
            self._connection.executemany(
                "INSERT INTO questions VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (split, position, q.id, q.text, json.dumps(q.true), json.dumps(q.false))
                    for split, questions in splits.items()
                    for position, q in enumerate(questions)
                ],
            )

    def questions(self, split: str) -> list[HeldOutQuestion]:
        """The questions of a split, in order; none for a run that has not come so far."""
        rows = self._connection.execute(
            "SELECT question, text, true_answers, false_answers FROM questions WHERE split = ? ORDER BY position",
            (split,),
        )
        return [
            HeldOutQuestion(id_, text, tuple(json.loads(true)), tuple(json.loads(false)))
            for id_, text, true, false in rows
        ]

    def judgements(self, judge: str) -> dict[tuple[str, str], tuple[float | None, str]]:
        """(question id, answer) -> (probability or None, why it is missing), by the judge of that fingerprint."""
        rows = self._connection.execute(
            "SELECT question, answer, probability, reason FROM judgements WHERE judge = ?", (judge,)
        )
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
        return dict(self._connection.execute("SELECT trial_id, seconds FROM timings").fetchall())

    def fact(self, key: str) -> Any:
        """A JSON value written by `set_fact`, or None."""
        row = self._connection.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_fact(self, key: str, value: Any) -> None:
        """Write a JSON value, replacing an earlier one."""
        with self._writing():
            self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

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
