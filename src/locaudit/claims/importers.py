"""Readers of claims from text, lists, JSON and CSV; file formats are functions in `locaudit.registry.IMPORTERS`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from locaudit.errors import LocationError
from locaudit.location import Location
from locaudit.registry import IMPORTERS, KINDS

FORMER = {"heads": "head", "neurons": "neuron"}
"""Older names of kinds, which are still accepted."""


def parse_location(claim: str | Path | Sequence | Mapping | Location, kind: str = "head") -> Location:
    """Read a location from a string like ``"14.3,15.7"``, a list of such units, a mapping, or a file.

    A string may begin with the kind of its units, as in ``neuron:3.117`` or ``mlp:8``. Without it, units are of the
    given `kind`. A list holds strings or pairs. A mapping (or JSON object) has the key ``units`` and optionally
    ``kind``. A file is read by the importer registered for its suffix (`IMPORTERS`). Raises `LocationError` for
    anything else.
    """
    if isinstance(claim, Location):
        return claim
    if isinstance(claim, Mapping):
        if "units" not in claim or not set(claim) <= {"units", "kind"}:
            raise LocationError(
                got=f"an object with the keys {sorted(map(str, claim))}",
                expected='{"kind": "head", "units": [[14, 3], [15, 7]]}',
                remedy="use these keys and no others",
            )
        return parse_location(claim["units"], claim.get("kind", kind))
    if isinstance(claim, str | Path):
        text = str(claim).strip()
        suffix = Path(text).suffix.removeprefix(".")
        if suffix in IMPORTERS:
            return IMPORTERS[suffix](Path(text), kind)
        prefix, _, rest = text.partition(":")
        if FORMER.get(prefix, prefix) in KINDS:
            kind, text = prefix, rest
        claim = [part for part in text.split(",") if part.strip()]
    if not isinstance(claim, Iterable):
        raise LocationError(got=f"the claim {claim!r}", expected="a list of units", remedy="write it as '14.3,15.7'")
    kind = FORMER.get(kind, kind)
    return Location(tuple(KINDS[kind].parse_unit(part) for part in claim), kind)


@IMPORTERS.register("json")
def read_json(path: Path, kind: str) -> Location:
    """Read a claim from a JSON file that holds a string, a list or an object (see `parse_location`)."""
    text = _read(path)
    try:
        return parse_location(json.loads(text), kind)
    except LocationError:
        raise
    except (ValueError, RecursionError) as error:
        raise LocationError(
            got=f"{path}, which is not JSON ({error})", expected="a list of units", remedy="fix the file"
        ) from None


@IMPORTERS.register("csv")
def read_csv(path: Path, kind: str) -> Location:
    """Read a CSV file with the columns ``layer`` and ``head`` (or ``neuron``); every row is a unit of the claim.

    Other columns with text are ignored. Another column of numbers, such as scores, is refused. Such a file probably
    lists all heads, and rows with low scores would become part of the claim.
    """
    cells = [[cell.strip() for cell in row] for row in csv.reader(_read(path).splitlines())]
    header, *lines = [row for row in cells if any(row)] or [[]]
    header = [name.lower() for name in header]
    kinds = [name for name in ("head", "neuron") if name in header]
    if "layer" not in header or len(kinds) != 1:
        got, remedy = f"{path} with the columns {header}", "use these names in its first line"
        if all(map(_is_number, header)) and header:
            got, remedy = f"{path}, whose first line is {','.join(header)}", "write layer,head as its first line"
        for mark, name in {";": "semicolons", "\t": "tabs"}.items():
            if len(header) == 1 and mark in header[0]:
                got, remedy = f"{path} with {name} between its columns", "save it with commas between the columns"
        raise LocationError(got=got, expected="the columns 'layer' and 'head' (or 'neuron')", remedy=remedy)
    at = header.index("layer"), header.index(kinds[0])
    scores = {i: cell for line in lines for i, cell in enumerate(line) if i not in at and _is_number(cell)}
    if scores:
        names = [header[i] if i < len(header) and header[i] else f"{i + 1}, without a name" for i in sorted(scores)]
        raise LocationError(
            got=f"{path} with numbers in the column {', '.join(names)}",
            expected="one row for each unit of the claim, without scores: every row counts as claimed",
            remedy="keep only the rows that are the claim, and drop that column (pandas: to_csv(index=False))",
        )
    units = [tuple(line[i] for i in at if i < len(line)) for line in lines]
    for unit in units:
        if not all(cell.isdecimal() for cell in unit) or len(unit) < 2:
            raise LocationError(
                got=f"{path} with the line layer, {kinds[0]} = {', '.join(unit)}",
                expected="two whole numbers, like 14,3",
                remedy="correct the line; write 14.0 as 14 (pandas: astype(int) before to_csv)",
            )
    return Location(tuple(KINDS[kinds[0]].parse_unit(unit) for unit in units), kinds[0])


def _is_number(cell: str) -> bool:
    try:
        float(cell.removesuffix("%"))
    except ValueError:
        return False
    return True


def _read(path: Path) -> str:
    if not path.is_file():
        raise LocationError(got=f"{path}, which is not a file", expected="a JSON or CSV file", remedy="check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise LocationError(got=f"{path}, which is not UTF-8 text", expected="text", remedy="check the file") from None
