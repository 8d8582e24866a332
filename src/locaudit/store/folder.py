"""Open run folders: one writer at a time, one configuration per folder."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from locaudit.config import (
    GROWS,
    AuditConfig,
    Registration,
    leaves,
    load_config,
    to_dict,
    to_yaml,
    unknown_names_kept,
)
from locaudit.errors import ConfigError, RunFolderError
from locaudit.store.database import SCHEMA, Store, connect
from locaudit.store.files import write_atomically

MARK = "config.yaml"
"""File with a run's settings; it also marks a folder as that of a run."""
SAVED_BEHAVIOUR = "behaviour.json"
"""File with the behaviour of a run that was given it as an object, not by name."""


def saved_config(folder: str | Path) -> AuditConfig | None:
    """The settings of the run in a folder; None if there is no run, or one that `open_run` will refuse."""
    with suppress(ConfigError):
        return load_config(Path(folder) / MARK)
    return None


@contextmanager
def open_run(folder: str | Path, config: AuditConfig, registration: Registration | None = None) -> Iterator[Store]:
    """Create a run folder, or open one for writing that can be continued with these settings and this claim file.

    A folder without stored trials accepts any settings. One with trials accepts changes that need no new edits or only
    add to the run: score, level and margin, judges, and more controls or questions (`locaudit.config.GROWS`). Its
    config.yaml is then rewritten together with the manifest (`Store.write_manifest`).

    Raises `RunFolderError` if the folder holds something else, was made with other settings (the error names them), is
    in use by another process, or if the disk is full.
    """
    folder = Path(folder)
    with lock_folder(folder, MARK):
        if not (folder / MARK).is_file():  # written first, because it marks the folder as a run folder
            write_atomically(folder / MARK, to_yaml(config).encode())
        connection = connect(folder / "trials.sqlite")
        try:
            _is_complete(folder, connection)
            store = Store(folder, config, connection)
            store.check_room()
            connection.executescript(SCHEMA)
            if store.is_empty():
                write_atomically(folder / MARK, to_yaml(config).encode())
            else:
                check_registration(store, registration)
                _check_config(store, config)
            for name in ("edits", "cache"):
                (folder / name).mkdir(exist_ok=True)
            yield store
        finally:
            connection.close()


@contextmanager
def lock_folder(folder: Path, mark: str) -> Iterator[None]:
    """Lock a folder against other processes, creating it if needed; `mark` is the file that says what it holds.

    A new folder that is still empty at the end, because what was to be written was refused, is removed again. Raises
    `RunFolderError` as `check_folder` does, and if another process holds the lock.
    """
    check_folder(folder, mark)
    is_new, lock = not folder.exists(), FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise RunFolderError(
            got=f"{folder}, which another process is writing to",
            expected="one writer at a time",
            remedy="wait for it, stop it, or choose another --out",
        ) from None
    except OSError as error:
        raise RunFolderError(
            got=f"{folder}, which cannot be made ({error.strerror})",
            expected="a folder to write to",
            remedy="check --out",
        ) from None
    try:
        yield
    finally:
        lock.release()
        if is_new and all(path.name == ".lock" for path in folder.iterdir()):
            shutil.rmtree(folder)


def check_run(folder: str | Path, config: AuditConfig, registration: Registration | None) -> bool:
    """Whether a folder holds stored trials. Writes nothing.

    Raises `RunFolderError` if `open_run` would refuse these settings or this claim file for it.
    """
    if not has_trials(folder):
        return False
    with read_run(folder) as store:
        check_registration(store, registration)
        _check_config(store, config)
    return True


def has_trials(folder: str | Path) -> bool:
    """Whether a folder is a run folder with at least one trial. Raises `OldRunError` for one of version 0.1.0."""
    try:
        with read_run(folder) as store:
            return not store.is_empty()
    except OldRunError:
        raise
    except RunFolderError:
        return False


@contextmanager
def read_run(folder: str | Path) -> Iterator[Store]:
    """Open an existing run folder for reading. Raises `RunFolderError` if it is not one."""
    folder = Path(folder)
    if not (folder / "trials.sqlite").is_file() or not (folder / "config.yaml").is_file():
        raise RunFolderError(
            got=f"{folder}, which is not a run folder",
            expected="a folder with config.yaml and trials.sqlite",
            remedy="give the folder that was the --out of a locaudit run",
        )
    connection = connect(folder / "trials.sqlite")
    try:
        if not _is_complete(folder, connection):
            raise RunFolderError(
                got=f"{folder}, whose trials.sqlite has not all of its tables yet",
                expected="a run with at least one trial",
                remedy="run the audit that started it again",
            )
        with unknown_names_kept():  # a run can be read even if its plug-ins are missing
            config = load_config(folder / "config.yaml")
        yield Store(folder, config, connection)
    finally:
        connection.close()


class OldRunError(RunFolderError):
    """A run folder of an earlier version, whose tables were different."""


def _is_complete(folder: Path, connection: sqlite3.Connection) -> bool:
    """Whether the database has all tables. Raises `OldRunError` if those that it has are not as in `SCHEMA`."""
    ask = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
    with closing(sqlite3.connect(":memory:")) as new:
        new.executescript(SCHEMA)
        found, wanted = (set(database.execute(ask)) for database in (connection, new))
    tables = {table for table, _ in found}
    if found != {(table, column) for table, column in wanted if table in tables}:
        raise OldRunError(
            got=f"{folder}, made by locaudit 0.1.0, or made by an earlier development version",
            expected="a run of this version, which stores trials in another way",
            remedy="run the audit again with another --out; its report.html and edits/ (load_edit) stay usable",
        )
    return found == wanted


def check_registration(store: Store, registration: Registration | None) -> None:
    """Raise `RunFolderError` for a claim file that is not the one that the run's first trial was started with."""
    found = store.manifest.registration if store.manifest else None
    if registration is None or store.is_empty():
        return
    if found is None:
        raise RunFolderError(
            got=f"{registration.file} for {store.folder}, whose trials began without a claim file",
            expected="a claim file given before the first trial",
            remedy="choose another --out, or leave out the claim file (--registered)",
        )
    if found.sha256 != registration.sha256:
        raise RunFolderError(
            got=f"{registration.file} with the hash {registration.hash} for {store.folder}, whose claim file was "
            f"{found.file} with the hash {found.hash}",
            expected="the claim file as it was before the first trial",
            remedy="choose another --out, or restore the file",
        )


def check_folder(folder: str | Path, mark: str = MARK) -> None:
    """Raise `RunFolderError` if `lock_folder` could not write to the folder or it holds other files. Writes nothing."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        got = f"{folder}, which cannot be made ({there} is a file)"
    elif not os.access(there, os.W_OK):
        got = f"{there} without write permission"
        got = got if there == folder else f"{folder}, which cannot be made ({got})"
    else:
        got = ""
    if got:
        raise RunFolderError(got=got, expected="a folder to write to", remedy="check --out")
    if there != folder:
        return
    stray = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
    if stray and not (folder / mark).is_file():
        raise RunFolderError(
            got=f"{folder} with other files in it ({', '.join(sorted(stray)[:3])})",
            expected="an empty folder or one of an earlier run",
            remedy="choose another --out",
        )


def _check_config(store: Store, config: AuditConfig) -> None:
    path = store.folder / "config.yaml"
    try:
        found = load_config(path)
    except ConfigError as error:
        raise RunFolderError(
            got=f"{path}, which does not load ({error.line})",
            expected="the configuration of this run",
            remedy="restore the file as the run wrote it, or choose another --out",
        ) from None
    old, new = dict(leaves(to_dict(found))), dict(leaves(to_dict(config)))
    refused = found.refuses(config)
    if refused:
        changed = "; ".join(
            f"{name}: {old.get(name, 'absent')} there, {new.get(name, 'absent')} here" for name in refused[:3]
        )
        more = " ..." if len(refused) > 3 else ""
        raise RunFolderError(
            got=f"{store.folder}, made by another configuration ({changed}{more})",
            expected="the same configuration, so that old and new trials can be compared. A run can only grow: raise "
            "controls, split.max_val, split.max_test or evaluation.samples, add judges, nulls or off_target "
            "behaviours, or set evaluation.max_new_tokens if it was 0",
            remedy="choose another --out, or repeat the earlier settings to resume",
        )
    registration = store.manifest.registration if store.manifest else None
    held = dict(leaves(registration.values)) if registration else {}
    grown = [name for name in GROWS if name in held and old[name] != new[name]]
    if registration and grown:
        changed = "; ".join(f"{name}: {old[name]} there, {new[name]} here" for name in grown)
        raise RunFolderError(
            got=f"{store.folder}, whose claim file {registration.file} fixes settings now raised ({changed})",
            expected="the values that the claim file fixed before the run",
            remedy="choose another --out, or leave these settings as they were",
        )
