"""The run folder: configuration, records in SQLite (one transaction a trial), edits, and shared preparation.

config.yaml      the configuration, every default spelled out
trials.sqlite    records, per-question scores, timings, facts of the run
edits/           one safetensors file a trial
cache/           what all trials share (activations' statistics, reference log-probabilities, drift text)
verdict.json, report.html, figures/
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from locaudit.config import AuditConfig, load_config, to_yaml
from locaudit.errors import ConfigError, RunFolderError
from locaudit.records import TrialRecord

MIN_FREE_BYTES = 64 * 2**20
"""A run does not start or go on with less room than this."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trials (
    trial_id TEXT PRIMARY KEY, arm TEXT NOT NULL, control INTEGER NOT NULL, method TEXT NOT NULL,
    hyperparameter REAL, location TEXT NOT NULL, status TEXT NOT NULL, record TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS scores (
    trial_id TEXT NOT NULL REFERENCES trials(trial_id), split TEXT NOT NULL, question TEXT NOT NULL,
    metric TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (trial_id, split, question, metric)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS timings (trial_id TEXT PRIMARY KEY, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


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
                self._connection.execute("INSERT INTO timings VALUES (?, ?)", (spec.trial_id, seconds / len(records)))

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


def no_room(folder: Path, free: int) -> RunFolderError:
    """The error for a full disk."""
    return RunFolderError(
        got=f"{free / 2**20:.0f} MiB free on the disk of {folder}",
        expected=f"at least {MIN_FREE_BYTES // 2**20} MiB",
        remedy="make room and run the same command again: finished trials are kept",
    )


@contextmanager
def open_run(folder: str | Path, config: AuditConfig) -> Iterator[Store]:
    """Create a run folder, or open one made by the same configuration, for writing.

    A folder without any record yet, such as one of a run that was refused, takes a new configuration.
    Raises `RunFolderError` if the folder holds something else, was made by another configuration (naming the settings
    that differ), is in use by another process, or the disk is full.
    """
    folder = Path(folder)
    _prepare_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise RunFolderError(
            got=f"{folder}, which another process is writing to",
            expected="one writer at a time",
            remedy="wait for it, stop it, or choose another --out",
        ) from None
    try:
        if not (folder / "config.yaml").is_file():  # first of all files: it marks the folder as a run's
            write_atomically(folder / "config.yaml", to_yaml(config).encode())
        connection = _connect(folder / "trials.sqlite")
        try:
            store = Store(folder, config, connection)
            store.check_room()
            connection.executescript(_SCHEMA)
            if store.done():
                _check_config(folder, config)
            write_atomically(folder / "config.yaml", to_yaml(config).encode())
            for name in ("edits", "cache", "figures"):
                (folder / name).mkdir(exist_ok=True)
            yield store
        finally:
            connection.close()
    finally:
        lock.release()


@contextmanager
def read_run(folder: str | Path) -> Iterator[Store]:
    """Open an existing run folder for reading."""
    folder = Path(folder)
    if not (folder / "trials.sqlite").is_file() or not (folder / "config.yaml").is_file():
        raise RunFolderError(
            got=f"{folder}, which is not a run folder",
            expected="a folder with config.yaml and trials.sqlite",
            remedy="name the --out of a locaudit run",
        )
    config = load_config(folder / "config.yaml")
    connection = _connect(folder / "trials.sqlite")
    try:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'trials'").fetchone():
            raise RunFolderError(
                got=f"{folder}, whose trials.sqlite has no records table",
                expected="a run that got past its start",
                remedy="run the same command again",
            )
        yield Store(folder, config, connection)
    finally:
        connection.close()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == 28:  # ENOSPC
            raise no_room(path.parent, 0) from error
        raise


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            got=f"{folder}, which cannot be made ({error.strerror})",
            expected="a folder to write to",
            remedy="check --out",
        ) from None
    if not os.access(folder, os.W_OK):
        raise RunFolderError(
            got=f"{folder} without write permission", expected="a writable folder", remedy="check --out"
        )
    stray = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
    if stray and not (folder / "config.yaml").is_file():
        raise RunFolderError(
            got=f"{folder} with other files in it ({', '.join(sorted(stray)[:3])})",
            expected="an empty folder or one of an earlier run",
            remedy="choose another --out",
        )


def _check_config(folder: Path, config: AuditConfig) -> None:
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        found = load_config(path)
    except ConfigError as error:
        raise RunFolderError(
            got=f"{path}, which does not load ({error})",
            expected="the configuration of this run",
            remedy="choose another --out",
        ) from None
    if found.hash != config.hash:
        raise RunFolderError(
            got=f"{folder}, made by another configuration ({_difference(found, config)})",
            expected="the same configuration, so that old and new trials can be compared",
            remedy="choose another --out, or repeat the earlier settings to resume",
        )


def _difference(found: AuditConfig, config: AuditConfig) -> str:
    from locaudit.config import to_dict

    def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    old, new = dict(flat(to_dict(found))), dict(flat(to_dict(config)))
    changed = [f"{key}: {old[key]} there, {new[key]} here" for key in new if old[key] != new[key]]
    return "; ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")


def _connect(path: Path) -> sqlite3.Connection:
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
