"""The command line, ``locaudit COMMAND``: a table of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from locaudit.errors import ConfigError, LocauditError

_PROGRAM = """Does editing give evidence for localization?

commands:
  locaudit demo [flags]                  a real audit of SmolLM2-135M in minutes
  locaudit audit [CONFIG.yaml] [flags]   audit a claim; run it again to resume
  locaudit paper [CONFIG.yaml] [flags]   every experiment and figure of the paper, on your model and data
  locaudit probe [CONFIG.yaml] [flags]   probe every head and print the best ones
  locaudit report DIR [flags]            read a finished run again, also by another score, level or margin
  locaudit export DIR --trial T --to F   a trial's edit as a PEFT adapter, merged weights or vectors
  locaudit judge validate|compare        judges of generated answers
  locaudit calibrate null|run|planted    error rates and power of the verdict

Each command has its own --help."""

COMMANDS = {
    "demo": "locaudit.cli.audit:demo",
    "audit": "locaudit.cli.audit:audit",
    "paper": "locaudit.cli.paper:paper",
    "probe": "locaudit.cli.audit:probe",
    "report": "locaudit.cli.audit:report",
    "export": "locaudit.cli.export:export",
    "judge": "locaudit.cli.judge:judge",
    "calibrate": "locaudit.cli.calibrate:calibrate",
}
"""Command -> ``module:function``; the function takes the arguments after the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 when a judge left so many answers without a judgement that there is no verdict; 2 for bad input; 130 when
    interrupted.
    """
    command, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_PROGRAM)
        return 0
    if command in ("--version", "-V"):
        print(f"locaudit {metadata.version('locaudit')}")
        return 0
    try:
        if command not in COMMANDS:
            raise ConfigError(
                got=f"the command {command!r}", expected=f"one of {', '.join(COMMANDS)}", remedy="see locaudit --help"
            )
        _quiet_libraries()
        module, _, function = COMMANDS[command].partition(":")
        with warnings.catch_warnings():
            warnings.showwarning = _show_note
            return getattr(importlib.import_module(module), function)(arguments) or 0
    except LocauditError as error:
        print(f"locaudit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(
            f"locaudit: got {error.strerror or error} at {error.filename or 'a file'}; expected to read or write it; "
            "check room, permissions and what is at that path, then repeat the command: finished trials are kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("locaudit: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _show_note(message: Warning | str, *_args: Any, **_keywords: Any) -> None:
    print(f"locaudit: note: {message}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of ours."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
