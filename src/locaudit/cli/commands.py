"""What commands share: subcommands, such as ``locaudit judge validate``, reading of flags, and printing."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import tyro
from rich.console import Console

from locaudit.errors import ConfigError
from locaudit.text import readable

Command = Callable[[list[str]], None]
C = TypeVar("C")
"""What flags are read into."""


def dispatch(name: str, program: str, commands: Mapping[str, Command], arguments: list[str]) -> None:
    """Run the subcommand named by the first argument; without arguments, print the help text `program`."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(program)
        return
    if arguments[0] not in commands:
        raise ConfigError(
            got=f"locaudit {name} {arguments[0]}",
            expected=f"one of {', '.join(commands)}",
            remedy=f"see locaudit {name} --help",
        )
    commands[arguments[0]](arguments[1:])


def read_flags(
    form: Callable[..., C], program: str, description: str | None, arguments: Sequence[str], **options: Any
) -> C:
    """What `tyro.cli` makes of the arguments. Raises `ConfigError` for wrong flags, which tyro would put in a box."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(form, prog=program, description=description, args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:  # after --help
            raise
    raise _wrong_flags(printed.getvalue(), program.partition(" [")[0])


def _wrong_flags(box: str, command: str) -> ConfigError:
    """The error in a box of tyro, whose parts are divided by lines: the message, similar flags, and how to get help.

    Rows are indented by five or six spaces (without a terminal's characters for boxes), their help texts by more.
    """
    rows = [line.strip("│").rstrip() for line in box.splitlines()[1:]]
    parts = [list(part) for is_rule, part in groupby(rows, lambda row: not row.strip(" ─-╰╯")) if not is_rule]
    message = " ".join(" ".join(row for row in parts[0] if not row.startswith(9 * " ")).split())
    similar = [found[1] for part in parts for row in part if (found := re.match(r" {5,6}(--[^ ,]+)", row))]
    hint = f"did you mean {' or '.join(sorted(similar))}? " if message.startswith("Unrecognized") and similar else ""
    return ConfigError(
        got=f"flags that cannot be read: {message.rstrip('.')}",
        expected=f"flags of {command}",
        remedy=f"{hint}See {command} --help" if hint else f"see {command} --help",
    )


def say(text: object, style: str | None = None, *, stderr: bool = False) -> None:
    """Print to the terminal. All printed text passes through here, also text of users and models (`readable`)."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(readable(str(text)), style=style)
