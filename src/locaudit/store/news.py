"""What a run is doing now: ``status.json`` of its driver, and what its database holds. Read without waiting for either.

The database is read in one short query, so that the run, which waits up to 30 s to write, never fails or stops for it.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from locaudit.errors import RunFolderError

STATUS, DATABASE = "status.json", "trials.sqlite"


def read_news(folder: str | Path) -> dict[str, Any]:
    """The keys of ``status.json`` (docs/run-folder.md), and ``stored``: how many trials the database has, by status.

    ``state`` is ``preparing``, ``running``, ``finished``, ``stopped``, or ``unknown`` (a folder of an earlier version).
    That a process was killed is seen on its own machine only; ``age`` is how many seconds old the news is.

    Raises `RunFolderError` for a folder that is not that of a run.
    """
    folder = Path(folder)
    found: dict[str, Any] = {"state": "unknown"}
    if not (folder / DATABASE).is_file():
        raise RunFolderError(
            got=f"{folder}, which is not a run folder",
            expected="a folder with config.yaml and trials.sqlite",
            remedy="give the folder that is the --out of a locaudit run",
        )
    with suppress(FileNotFoundError, ValueError):  # a damaged one says nothing
        found |= json.loads((folder / STATUS).read_text(encoding="utf-8"))
    is_gone = found.get("host") == socket.gethostname() and not _is_alive(found["pid"])
    if is_gone and found["state"] in ("preparing", "running"):
        found["state"] = "stopped"
    if "updated" in found:
        found["age"] = max(time.time() - found["updated"], 0.0)
    ask = "SELECT status, count(*) FROM places JOIN fits USING (fit) GROUP BY status"
    with closing(
        sqlite3.connect(f"{(folder / DATABASE).absolute().as_uri()}?mode=ro", timeout=0.2, uri=True)
    ) as connection:
        try:
            found["stored"] = dict(connection.execute(ask).fetchall())
        except sqlite3.OperationalError:  # no tables yet, or locked for writing
            found["stored"] = None
        except sqlite3.DatabaseError as error:
            raise RunFolderError(
                got=f"{folder / DATABASE}, which cannot be read ({error})",
                expected="the database of a locaudit run",
                remedy="restore the file from a copy, or run again into another --out",
            ) from None
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
