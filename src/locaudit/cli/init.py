"""``locaudit init``: a file of settings to begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from locaudit.cli.commands import read_flags, say
from locaudit.config.files import preset_text
from locaudit.errors import ConfigError
from locaudit.store.files import write_atomically


@dataclass(frozen=True)
class _Init:
    file: tyro.conf.Positional[Path] = Path("audit.yaml")
    """File to write. It must not exist."""


def init(arguments: Sequence[str]) -> None:
    """Parse ``locaudit init [FILE]`` and write a file with the common settings of an audit, each with a comment."""
    words = "Write the common settings of an audit, with comments, for `locaudit audit FILE`."
    file = read_flags(_Init, "locaudit init", words, arguments).file
    if file.exists():
        raise ConfigError(got=f"{file}, which exists", expected="a new file", remedy="name another file, or delete it")
    write_atomically(file, preset_text("audit").encode())
    say(f"wrote {file}. Edit it, then run: locaudit audit {file} --out runs/mine")
