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


def tune_allocator() -> None:
    """Start this process again with these settings of glibc, which it reads once, where it is a glibc.

    Not if `GLIBC_TUNABLES` is in the environment, whatever it says. Call it before anything else.
    """
    if "GLIBC_TUNABLES" in os.environ or not _has_glibc() or not sys.executable:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
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
