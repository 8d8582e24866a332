"""The start of ``locaudit``: with a C library that leaves fewer holes in memory.

PyTorch asks for tensors at multiples of 64 bytes. glibc cuts them out of larger pieces, and keeps the cut-off rest for
small objects, which then lie for long between tensors that come and go: no tensor of the same size fits there again.
Without its caches of small pieces the rest joins its neighbours. docs/performance.md has the numbers.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

TUNABLES = {
    "tcache_count": 0,
    "mxfast": 0,
    "mmap_threshold": 2**25,  # as far as glibc goes by itself; setting the next one keeps it where it is
    "trim_threshold": 2**28,  # what a step gives back serves the next one
}
VARIABLE = "GLIBC_TUNABLES"
"""Where glibc looks for its settings, once, when a process starts."""
_STARTED = "LOCAUDIT_STARTED"
"""Set in a process that was started again: some take `VARIABLE` away."""


def settings() -> dict[str, str]:
    """These settings for the environment; none where others or an allocator are chosen, or without a glibc."""
    chosen = any(name in (VARIABLE, "LD_PRELOAD") or name.startswith("MALLOC_") for name in os.environ)
    if chosen or not _has_glibc():
        return {}
    return {VARIABLE: ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}


def tune_allocator() -> None:
    """Start this process again with `settings`, if there are any; what ran before runs twice.

    Not if that could do anything else than the command line says.
    """
    wanted = settings()
    if wanted and _STARTED not in os.environ and _can_start_again():
        environment = {**os.environ, **wanted, _STARTED: str(os.getpid())}
        with suppress(OSError):  # then with its holes
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _can_start_again() -> bool:
    """Whether this is the interpreter itself with a program that can be read again, unwatched and alone."""
    watched = sys.gettrace() or sys.getprofile() or sys.flags.interactive or hasattr(sys, "ps1")
    if watched or threading.active_count() > 1 or not sys.executable:
        return False
    # Not from a pipe, which is read up by now: whatever the program has made of sys.argv.
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not (sys.argv[0] == "-c" if file is None else Path(file).is_file()):
        return False
    try:
        return Path("/proc/self/exe").samefile(sys.executable)
    except OSError:
        return False


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False


def main() -> int:
    """``locaudit COMMAND``."""
    tune_allocator()
    from locaudit import cli

    return cli.main()
