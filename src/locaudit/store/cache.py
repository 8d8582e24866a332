"""What was generated and judged before, in any run: a content-addressed store shared by all runs of a user.

An address is a hash of all that a value is known to depend on, so an entry is not replaced, only left unused. The
folder is ``$LOCAUDIT_CACHE``, else ``$XDG_CACHE_HOME/locaudit``, else ``~/.cache/locaudit``; ``LOCAUDIT_CACHE=off``
keeps nothing on disk. Losing the file loses time only.
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
"""Addresses of one query; SQLite allows a limited number of parameters."""


class Cache:
    """Address -> JSON value, in a dict and, if there is a file, in SQLite. Trouble with the file is a warning."""

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
        """Values of those addresses that have one."""
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
        """Keep values, all or none of them; an address keeps the value that it has."""
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
            f"the cache of generations and judgements cannot use {what} ({error}); going on without it. "
            "LOCAUDIT_CACHE names another folder, or is 'off'",
            UserWarning,
            stacklevel=3,
        )
        self.close()


def cache_folder() -> Path | None:
    """The folder that the environment names; None if nothing is to be kept on disk."""
    named = os.environ.get("LOCAUDIT_CACHE")
    if named == "off":
        return None
    try:
        return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "locaudit"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def open_cache() -> Cache:
    """The user's cache, at the place that the environment names."""
    folder = cache_folder()
    return Cache(folder and folder / "answers.sqlite")
