"""What commands share: subcommands, such as ``locaudit judge validate``, and printing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console

from locaudit.errors import ConfigError
from locaudit.text import readable

Command = Callable[[list[str]], None]


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


def say(text: object, style: str | None = None) -> None:
    """Print to the terminal. All printed text passes through here, also text of users and models (`readable`)."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    console.print(readable(str(text)), style=style)
