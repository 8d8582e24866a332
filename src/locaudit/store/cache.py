"""A cache of generated answers and judgements, shared by all runs of a user.

The address of an entry is a hash of everything that its value depends on, so entries never have to be replaced. The
folder is ``$LOCAUDIT_CACHE``, else ``$XDG_CACHE_HOME/locaudit``, else ``~/.cache/locaudit``. With
``LOCAUDIT_CACHE=off`` nothing is kept on disk. The file can be deleted at any time: what it held is computed again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 500
"""Addresses per query; SQLite limits the number of parameters."""


class Cache:
    """Maps addresses to JSON values, in an SQLite file or, without one, in memory.

    If the file cannot be used, there is a warning and the cache continues in memory.
    """

    def __init__(self, path: Path | None = None):
        self._memory: dict[str, Any] = {}
        self._connection: sqlite3.Connection | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=30)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS entries (address TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
                )
        except (sqlite3.Error, OSError) as error:
            self._give_up(path, error)

    def get(self, addresses: Sequence[str]) -> dict[str, Any]:
        """The values of those addresses that are in the cache."""
        found = {address: self._memory[address] for address in addresses if address in self._memory}
        if self._connection is not None:
            wanted = [address for address in dict.fromkeys(addresses) if address not in found]
            try:
                for start in range(0, len(wanted), _CHUNK):
                    part = wanted[start : start + _CHUNK]
                    marks = ",".join("?" * len(part))
                    rows = self._connection.execute(
                        f"SELECT address, value FROM entries WHERE address IN ({marks})", part
                    )
                    found.update((address, json.loads(value)) for address, value in rows)
            except (sqlite3.Error, ValueError) as error:
                self._give_up("its file", error)
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Store values in one transaction. An address that has a value already keeps it."""
        if self._connection is None:
            self._memory.update({address: value for address, value in values.items() if address not in self._memory})
            return
        try:
            with self._connection:
                self._connection.executemany(
                    "INSERT OR IGNORE INTO entries VALUES (?, ?)",
                    [(address, json.dumps(value)) for address, value in values.items()],
                )
        except sqlite3.Error as error:
            self._give_up("its file", error)
            self.put(values)

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _give_up(self, what: object, error: Exception) -> None:
        warnings.warn(
            f"the cache of generated answers and judgements cannot use {what} ({error}); going on without it. "
            "Set LOCAUDIT_CACHE to another folder, or to 'off'",
            UserWarning,
            stacklevel=3,
        )
        self.close()


def cache_folder() -> Path | None:
    """The cache folder that the environment sets; None if nothing is to be kept on disk."""
    named = os.environ.get("LOCAUDIT_CACHE")
    if named == "off":
        return None
    try:
        return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locaudit"
    except RuntimeError:  # the user has no home folder, as in some containers
        return None


def open_cache() -> Cache:
    """Open the user's cache in `cache_folder`."""
    folder = cache_folder()
    return Cache(folder and folder / "answers.sqlite")
