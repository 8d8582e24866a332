"""Shared by all commands: reading settings from the command line, Markdown tables, facts about the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from locaudit.errors import ConfigError, LocauditError

PACKAGES = ("torch", "transformers", "locaudit", "trl", "peft", "lm_eval", "scikit-learn", "transformer-lens", "pyvene")
S = TypeVar("S")


def _positive(texts: list[str]) -> int:
    number = int(texts[0]) if texts[0].isdecimal() else 0
    if number < 1:
        raise ValueError(f"got {texts[0]!r}, expected a positive whole number")
    return number


Positive = Annotated[int, PrimitiveConstructorSpec(1, "N", _positive, lambda x: isinstance(x, int), lambda x: [str(x)])]
"""A positive whole number."""


def run(main: Callable[[S], Any], settings: type[S], doc: str | None, arguments: list[str] | None = None) -> NoReturn:
    """Call `main` with settings from the command line. Bad input exits with code 2 and a message, not a traceback."""
    given = tyro.cli(settings, description=doc, args=arguments)
    try:
        sys.exit(main(given))
    except LocauditError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def check_out(out: Path | None) -> None:
    """Raise `ConfigError` if `out` cannot be written."""
    if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise ConfigError(got=f"--out {out}", expected="a file in a writable folder", remedy="name another path")


def stated(settings: Any) -> dict[str, Any]:
    """Settings for a report; of absolute paths, only the last part."""

    def plain(value: Any) -> Any:
        return Path(value).name if isinstance(value, str | Path) and Path(value).is_absolute() else value

    return asdict(settings, dict_factory=lambda items: {key: plain(value) for key, value in items})


def write_json(path: Path, report: Any) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def line(cells: Iterable[Any]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*names: str) -> str:
    """The header row and the rule of a Markdown table."""
    return line(names) + "\n" + "|---" * len(names) + "|"


def say(text: str) -> None:
    """Print progress to standard error."""
    print(text, file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, Any]:
    """The hardware and package versions of a measurement."""
    versions = {found.name: found.version for found in importlib.metadata.distributions() if found.name in PACKAGES}
    cpu = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((text.split(":", 1)[1].strip() for text in file if text.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "versions": versions,
    }
