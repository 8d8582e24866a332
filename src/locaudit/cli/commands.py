"""Commands with subcommands, such as ``locaudit judge validate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from locaudit.errors import ConfigError

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
