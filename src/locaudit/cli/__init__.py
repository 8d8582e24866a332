"""The command line, ``locaudit COMMAND``. The code of a command is imported only when it is called."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from locaudit.errors import ConfigError, LocauditError
from locaudit.text import readable

_PROGRAM = """Does editing give evidence for localization?

commands:
  locaudit demo [--positive] [flags]     a real audit of SmolLM2-135M, in minutes; --positive: other heads
  locaudit behaviour check FILE          what was read from your questions, and what gives their answers away
  locaudit init [FILE]                   write a commented file of settings for an audit
  locaudit audit [CONFIG.yaml] [flags]   audit a claim; repeat the command to resume
  locaudit status RUN [--watch]          what is a run doing now? Trials done, running, failed, time left
  locaudit design RUN|CONFIG.yaml        how large must an audit be? From a run, or from a pilot
  locaudit paper [CONFIG.yaml] [flags]   run every experiment of the paper on your model and data
  locaudit find [CONFIG.yaml] [flags]    rank every head, neuron or layer by probes, gradients or patching
  locaudit heuristics [CONFIG.yaml]      which of these rules finds better places than chance?
  locaudit report DIR [flags]            write a report again, or use another score, level or margin
  locaudit compare RUN RUN...            put audits side by side, with p corrected for their number
  locaudit table RUN [--format F]        the verdict as LaTeX or Markdown, with a paragraph for the methods section
  locaudit figures RUN [--width W]       figures for a paper, as PDF, SVG or PNG
  locaudit export DIR --out FOLDER       export an edit: PEFT adapter, merged weights or vectors
  locaudit lm-eval RUN --tasks TASK...   tasks of lm-evaluation-harness on the model under an edit of the run
  locaudit judge validate|compare|sample measure or compare judges; draw answers for people to label
  locaudit calibrate null|run|planted|coverage
                                         measure error rates and power of the verdict
  locaudit doctor                        what is installed and found here, and a short test

locaudit COMMAND --help lists the flags of a command."""

COMMANDS = {
    "demo": "locaudit.cli.audit:demo",
    "behaviour": "locaudit.cli.behaviour:behaviour",
    "init": "locaudit.cli.init:init",
    "audit": "locaudit.cli.audit:audit",
    "status": "locaudit.cli.status:status",
    "design": "locaudit.cli.design:design",
    "paper": "locaudit.cli.paper:paper",
    "find": "locaudit.cli.find:find",
    "heuristics": "locaudit.cli.find:heuristics",
    "report": "locaudit.cli.audit:report",
    "compare": "locaudit.cli.compare:compare",
    "table": "locaudit.cli.write_up:table",
    "figures": "locaudit.cli.write_up:figures",
    "export": "locaudit.cli.export:export",
    "lm-eval": "locaudit.cli.harness:lm_eval",
    "judge": "locaudit.cli.judge:judge",
    "calibrate": "locaudit.cli.calibrate:calibrate",
    "doctor": "locaudit.cli.doctor:doctor",
}
"""Command -> ``module:function``. The function takes the list of arguments after the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    The codes are 0: success; 1: no verdict, because too many judgements are missing; 2: bad input; 130: interrupted by
    Ctrl-C; 141: the program that reads the output has ended; 143: interrupted by the signal SIGTERM.
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
        with warnings.catch_warnings(), _termination_raised():
            warnings.showwarning = _show_note
            return getattr(importlib.import_module(module), function)(arguments) or 0
    except LocauditError as error:
        _print_note(error.line)
        return 2
    except BrokenPipeError:  # the program that reads our output has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        _print_note(
            f"got {error.strerror or error} at {error.filename or 'a file'}; expected to read or write it; "
            "check disk space, permissions and the path, then repeat the command: finished trials are kept"
        )
        return 2
    except KeyboardInterrupt as error:
        _print_note("interrupted; repeat the command to continue. A report written before does not show newer trials")
        return 143 if isinstance(error, _Terminated) else 130


class _Terminated(KeyboardInterrupt):
    """The signal SIGTERM, such as that of a scheduler whose time is up."""


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Inside this context, SIGTERM stops the program as Ctrl-C does: what is finished is kept, and a line says so."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_note(message: Warning | str, *_args: Any, **_keywords: Any) -> None:
    _print_note(f"note: {message}")


def _print_note(text: str) -> None:
    print(f"locaudit: {readable(text)}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Turn off progress bars and advice of other libraries, which would mix with our output."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
