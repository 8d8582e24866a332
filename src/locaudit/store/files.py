"""Write files of a run folder atomically, and with a clear error if the disk is full."""

from __future__ import annotations

import os
from pathlib import Path

from locaudit.errors import RunFolderError

MIN_FREE_BYTES = 64 * 2**20
"""A run neither starts nor continues with less free disk space than this."""


def no_room(folder: Path, free: int) -> RunFolderError:
    """The error for a full disk."""
    return RunFolderError(
        got=f"{free / 2**20:.0f} MiB free on the disk of {folder}",
        expected=f"at least {MIN_FREE_BYTES // 2**20} MiB",
        remedy="free disk space and run the same command again: finished trials are kept",
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it has either its old or its new content even if the process is killed.

    Raises `RunFolderError` if the disk is full.
    """
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
