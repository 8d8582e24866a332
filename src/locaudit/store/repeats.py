"""Folders with several repeats of an audit: ``repeat-0``, ``repeat-1``, ... and the number that is planned."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from locaudit.errors import RunFolderError
from locaudit.records import json_text
from locaudit.store.files import write_atomically

PLAN = "repeats.json"
"""File with the planned number of repeats, and earlier such numbers. It also marks a folder as that of repeats."""
PAGE = "repeats.html"
"""Page of the verdict over the repeats."""
MOST = 1000
"""Largest number of repeats of an audit."""


def repeat_folder(folder: str | Path, number: int) -> Path:
    """The run folder of a repeat."""
    return Path(folder) / f"repeat-{number}"


def is_repeats(folder: str | Path) -> bool:
    """Whether `locaudit audit --repeats` wrote the folder."""
    return (Path(folder) / PLAN).is_file()


def read_plan(folder: str | Path) -> list[int]:
    """Each number of repeats that was asked for, in order; empty in a new folder.

    Raises `RunFolderError` if the file that holds them is damaged.
    """
    if not is_repeats(folder):
        return []
    planned = None
    with suppress(ValueError, AttributeError):
        found = json.loads((Path(folder) / PLAN).read_text(encoding="utf-8"))
        planned = found.get("planned", [found.get("n_repeats")])
    if not isinstance(planned, list) or not planned or not all(type(n) is int and 2 <= n <= MOST for n in planned):
        raise RunFolderError(
            got=f"{Path(folder) / PLAN}, which does not say how many repeats were planned",
            expected=f"the file as locaudit wrote it, with numbers from 2 to {MOST}",
            remedy="restore the file, or delete it and run the same command again",
        )
    return planned


def write_plan(folder: str | Path, repeats: int) -> None:
    """Record how many repeats are planned before they run, so that a later increase is visible.

    If the number changes, the earlier verdict and its page are deleted.
    """
    planned, folder = read_plan(folder), Path(folder)
    if repeats not in planned:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).unlink(missing_ok=True)
        write_atomically(folder / PLAN, json_text({"planned": [*planned, repeats]}).encode())
