"""The start of ``locaudit``: with a C library that leaves fewer holes in memory.

PyTorch asks for tensors at multiples of 64 bytes. glibc cuts them out of larger pieces, and keeps the cut-off rest for
small objects, which then lie for long between tensors that come and go: no tensor of the same size fits there again.
Without its caches of small pieces the rest joins its neighbours. docs/performance.md has the numbers.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

TUNABLES = {
    "tcache_count": 0,
    "mxfast": 0,
    "mmap_threshold": 2**25,  # where glibc ends up by itself; it no longer moves once the next is set
    "trim_threshold": 2**28,  # what a step gives back serves the next one
}


VARIABLE = "GLIBC_TUNABLES"
"""Where glibc looks for its settings, once, when a process starts."""


def settings() -> dict[str, str]:
    """These settings for the environment; none if they or others are there, or for another C library."""
    if VARIABLE in os.environ or not _has_glibc():
        return {}
    return {VARIABLE: ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}


def tune_allocator() -> None:
    """Start this process again with `settings`, if there are any. Call it before anything else."""
    wanted = settings()
    if wanted and sys.executable:
        os.environ.update(wanted)
        with suppress(OSError):  # then with its holes
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
