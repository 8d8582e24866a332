"""The arguments that benchmarks share, refused before any work where they cannot be right."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Options
from locaudit.errors import LocauditError


def parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser with ``--model``, ``--dtype``, ``--device``, ``--data`` and ``--out``."""
    out = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--model", default=Options.model)
    out.add_argument("--dtype", default=Options.dtype, choices=("float32", "bfloat16", "float16"))
    out.add_argument("--device", default=Options.device)
    out.add_argument("--data", default=Options.data, help="behaviour by name or file")
    out.add_argument("--out", type=Path, help="write JSON here too")
    return out


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from 1 on")
    return number


def parse(given: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; ends the process with what is wrong about them."""
    args = given.parse_args()
    if args.out is not None and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        given.error(f"got --out {args.out}, expected a file in a folder that can be written to")

    from bench.work import check

    try:
        check(Options(args.model, args.dtype, args.device, args.data))
    except LocauditError as error:
        given.error(str(error))
    return args


def ending(main: Callable[[], Any]) -> Any:
    """What `main` gives; an error that says what to do ends the process without a traceback."""
    try:
        return main()
    except LocauditError as error:
        raise SystemExit(f"error: {error}") from None
