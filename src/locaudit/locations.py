"""Locations: sets of attention heads or MLP neurons, and random controls matched to a claim."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from locaudit.errors import LocationError

Kind = Literal["heads", "neurons"]
Match = Literal["none", "layer"]

_UNIT = re.compile(r"^\s*(\d+)\s*[.:]\s*(\d+)\s*$")


@dataclass(frozen=True)
class Location:
    """A set of units: ``(layer, head)`` or ``(layer, neuron)``, both counted from 0, sorted and without repeats.

    A head is a slice of the input of its layer's attention output projection, a neuron one coordinate of the input
    of the MLP down projection; `coordinates` turns either into coordinates, and nothing after that differs.
    """

    units: tuple[tuple[int, int], ...]
    """(layer, unit) pairs."""
    kind: Kind = "heads"
    """Which projection's input the units are coordinates of."""

    def __post_init__(self):
        if self.kind not in ("heads", "neurons"):
            raise LocationError(
                got=f"kind {self.kind!r}", expected="'heads' or 'neurons'", remedy="name one of the two kinds"
            )
        units = tuple((int(layer), int(unit)) for layer, unit in self.units)
        if not units:
            raise LocationError(
                got="an empty location", expected="at least one unit", remedy="name units like '14.3,15.7'"
            )
        if min(min(pair) for pair in units) < 0:
            raise LocationError(
                got=f"a negative index in {units}", expected="layers and units from 0", remedy="count from 0"
            )
        repeated = [f"{layer}.{unit}" for (layer, unit), n in Counter(units).items() if n > 1]
        if repeated:
            raise LocationError(
                got=f"{', '.join(sorted(repeated))} named more than once",
                expected="each unit once",
                remedy="drop the repeats: the size of a location sets the size of its controls",
            )
        object.__setattr__(self, "units", tuple(sorted(units)))

    def __len__(self) -> int:
        return len(self.units)

    def __str__(self) -> str:
        text = ",".join(f"{layer}.{unit}" for layer, unit in self.units)
        return text if self.kind == "heads" else f"neurons:{text}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers touched, in order."""
        return tuple(sorted({layer for layer, _ in self.units}))

    def coordinates(self, unit_width: int) -> dict[int, list[int]]:
        """Coordinates of each layer's projection input, `unit_width` of them (head_dim, or 1) for each unit."""
        out: dict[int, list[int]] = {}
        for layer, unit in self.units:
            out.setdefault(layer, []).extend(range(unit * unit_width, (unit + 1) * unit_width))
        return out

    def check(self, n_layers: int, units_per_layer: int) -> None:
        """Raise `LocationError` if a unit lies outside a model of this shape."""
        outside = [f"{layer}.{unit}" for layer, unit in self.units if layer >= n_layers or unit >= units_per_layer]
        if outside:
            raise LocationError(
                got=f"{self.kind} {', '.join(outside[:5])}{' ...' if len(outside) > 5 else ''}",
                expected=f"layers 0-{n_layers - 1} and {self.kind} 0-{units_per_layer - 1} (this model's shape)",
                remedy="check the claim's numbering (layer.unit, both from 0) and the model it was made for",
            )


def parse_location(claim: str | Path | Sequence | Mapping | Location, kind: Kind = "heads") -> Location:
    """Read a location from ``"14.3,15.7"``, a list of pairs or of such strings, a mapping, or a JSON or CSV file.

    A string may start with ``heads:`` or ``neurons:``. A mapping (or JSON object) has ``units`` and optionally
    ``kind``. A CSV file has the columns ``layer`` and ``head`` (or ``neuron``).
    """
    if isinstance(claim, Location):
        return claim
    if isinstance(claim, Mapping):
        return _from_mapping(claim, kind)
    if isinstance(claim, str | Path):
        text = str(claim).strip()
        if text.endswith((".json", ".csv")):
            return _from_file(Path(text), kind)
        prefix, _, rest = text.partition(":")
        if prefix in ("heads", "neurons"):
            kind, text = prefix, rest  # type: ignore[assignment]
        return Location(tuple(_parse_unit(part) for part in text.split(",") if part.strip()), kind)
    if not isinstance(claim, Iterable):
        raise LocationError(got=f"the claim {claim!r}", expected="a list of units", remedy="write it as '14.3,15.7'")
    return Location(tuple(_parse_unit(part) for part in claim), kind)


def _from_mapping(claim: Mapping, kind: Kind) -> Location:
    if "units" not in claim or not set(claim) <= {"units", "kind"}:
        raise LocationError(
            got=f"an object with the keys {sorted(map(str, claim))}",
            expected='{"kind": "heads", "units": [[14, 3], [15, 7]]}',
            remedy="give these keys and no others",
        )
    return parse_location(claim["units"], claim.get("kind", kind))


def _from_file(path: Path, kind: Kind) -> Location:
    if not path.is_file():
        raise LocationError(got=f"{path}, which is not a file", expected="a JSON or CSV file", remedy="check the path")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise LocationError(got=f"{path}, which is not UTF-8 text", expected="text", remedy="check the file") from None
    if path.suffix == ".json":
        try:
            return parse_location(json.loads(text), kind)
        except LocationError:
            raise
        except (ValueError, RecursionError) as error:
            raise LocationError(
                got=f"{path}, which is not JSON ({error})", expected="a list of units", remedy="mend the file"
            ) from None
    header, *lines = [
        [cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(map(str.strip, row))
    ] or [[]]
    units = [name for name in ("head", "neuron") if name in header]
    unit = units[0] if len(units) == 1 else None
    if "layer" not in header or unit is None:
        raise LocationError(
            got=f"{path} with the columns {header}",
            expected="the columns 'layer' and 'head' (or 'neuron')",
            remedy="rename the columns",
        )
    at = header.index("layer"), header.index(unit)
    return Location(
        tuple(_parse_unit(tuple(line[i] for i in at if i < len(line))) for line in lines),
        "heads" if unit == "head" else "neurons",
    )


def _parse_unit(part: object) -> tuple[int, int]:
    if isinstance(part, str):
        match = _UNIT.match(part)
        if match:
            return int(match[1]), int(match[2])
    elif isinstance(part, Iterable):
        pair = tuple(part)
        if len(pair) == 2 and all(str(x).strip().isdecimal() for x in pair):
            return int(pair[0]), int(pair[1])
    raise LocationError(
        got=f"the unit {part!r}",
        expected="LAYER.UNIT with whole numbers, like 14.3, or a pair [14, 3]",
        remedy="write a claim as '14.3,15.7', or give a JSON or CSV file",
    )


def all_units(n_layers: int, units_per_layer: int, kind: Kind = "heads") -> Location:
    """The whole model: every unit of every layer."""
    return Location(tuple((layer, u) for layer in range(n_layers) for u in range(units_per_layer)), kind)


def sample_controls(
    claim: Location,
    n_layers: int,
    units_per_layer: int,
    n: int,
    *,
    seed: int,
    match: Match = "none",
    disjoint: bool = True,
) -> list[Location]:
    """`n` different random locations of the claim's size and kind.

    ``match="layer"`` gives each control as many units in each layer as the claim has there; ``"none"`` draws from all
    layers. `disjoint` keeps the claim's units out of the controls; otherwise any set but the claim itself may come.
    Drawing is uniform over the allowed sets; controls may overlap each other, as independent draws do. Raises
    `LocationError` when fewer than `n` such sets exist.

    A claim is exchangeable with controls drawn with ``disjoint=False``. Disjoint ones answer another question (is there
    as good a place *elsewhere*?), and a random claim that happens to hold the model's best unit beats all of them: with
    a claim of k of the model's n units, the false-positive rate can reach about k / n where that exceeds the level.
    """
    claim.check(n_layers, units_per_layer)
    taken = set(claim.units) if disjoint else set()
    free = {layer: [u for u in range(units_per_layer) if (layer, u) not in taken] for layer in range(n_layers)}
    per_layer = Counter(layer for layer, _ in claim.units)
    available = _count_controls(claim, free, per_layer, match) - (not disjoint)
    if available < n:
        raise LocationError(
            got=f"a claim of {len(claim)} {claim.kind} and {n} controls wanted",
            expected=f"at most {available} different {'disjoint ' if disjoint else ''}controls (matching: {match})",
            remedy="ask for fewer controls, a smaller claim, or matching 'none'",
        )
    rng = random.Random(seed)
    pool = [(layer, u) for layer in range(n_layers) for u in free[layer]]
    found: dict[tuple, Location] = {}
    while len(found) < n:
        if match == "layer":
            units = [(layer, u) for layer, k in sorted(per_layer.items()) for u in rng.sample(free[layer], k)]
        else:
            units = rng.sample(pool, len(claim))
        location = Location(tuple(units), claim.kind)
        if location.units != claim.units:
            found.setdefault(location.units, location)
    return list(found.values())


def _count_controls(claim: Location, free: Mapping[int, list], per_layer: Mapping[int, int], match: Match) -> int:
    from math import comb, prod

    if match == "layer":
        return prod(comb(len(free[layer]), k) for layer, k in per_layer.items())
    return comb(sum(map(len, free.values())), len(claim))
