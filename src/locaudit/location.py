"""Locations: sets of attention heads or MLP neurons, and random controls matched to a claim."""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, prod
from pathlib import Path
from typing import Literal

from locaudit.errors import LocationError

Kind = Literal["heads", "neurons"]
Match = Literal["none", "layer", "kv-group", "probe-accuracy", "norm"]
N_BINS, LEAST_IN_BIN = 10, 4
"""Bins of matching by a value, and units that a bin has at least: a model of few units has fewer bins."""

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

    def complement(self, n_layers: int, units_per_layer: int) -> Location:
        """Every other unit of a model of this shape; `LocationError` if there is none."""
        own = set(self.units)
        units = [(layer, u) for layer in range(n_layers) for u in range(units_per_layer)]
        return Location(tuple(unit for unit in units if unit not in own), self.kind)

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


def unit_strata(
    match: Match,
    n_layers: int,
    units_per_layer: int,
    *,
    n_groups: int | None = None,
    values: Sequence[Sequence[float]] | None = None,
) -> dict[tuple[int, int], int]:
    """Stratum of every (layer, unit): a control has as many units in each stratum as the claim.

    ``none``: one stratum. ``layer``: the layer. ``kv-group``: the `n_groups` groups of a layer whose heads share keys
    and values. ``probe-accuracy`` and ``norm``: up to `N_BINS` bins of equal size by rank of `values` (layers x
    units); ties by layer, then unit.
    """
    units = [(layer, unit) for layer in range(n_layers) for unit in range(units_per_layer)]
    if match == "none":
        return dict.fromkeys(units, 0)
    if match == "layer":
        return {(layer, unit): layer for layer, unit in units}
    if match == "kv-group":
        groups = n_groups or units_per_layer
        width = units_per_layer // groups
        return {(layer, unit): layer * groups + unit // width for layer, unit in units}
    if values is None:
        raise LocationError(
            got=f"matching by {match} without its values",
            expected="a value for every unit",
            remedy="pass values (layers x units)",
        )
    ranked = sorted(units, key=lambda unit: (values[unit[0]][unit[1]], unit))
    n_bins = max(1, min(N_BINS, len(ranked) // LEAST_IN_BIN))
    return {unit: rank * n_bins // len(ranked) for rank, unit in enumerate(ranked)}


def sample_controls(
    claim: Location,
    strata: Mapping[tuple[int, int], int],
    n: int,
    *,
    seed: int,
    disjoint: bool = False,
) -> list[Location]:
    """`n` different random locations of the claim's size and kind, or all that there are if those are fewer.

    `strata` holds every unit of the model (`unit_strata`); each control has as many units in each stratum as the claim.
    Any such set but the claim itself may come, the same chance for each, so that a claim drawn in the same way is
    exchangeable with its controls: the first k of them are the same for every n. `disjoint` keeps the claim's units out
    of the controls. Raises `LocationError` when no such set exists.

    Disjoint controls answer another question (is there as good a place *elsewhere*?), and a random claim that happens
    to hold the model's best unit beats all of them: with a claim of k of the model's n units, the false-positive rate
    can reach about k / n where that exceeds the level. For a claim of one unit, the two are the same.
    """
    taken = set(claim.units) if disjoint else set()
    wanted = Counter(strata[unit] for unit in claim.units)
    free: dict[int, list[tuple[int, int]]] = {stratum: [] for stratum in sorted(wanted)}
    for unit in sorted(strata):
        if strata[unit] in wanted and unit not in taken:
            free[strata[unit]].append(unit)
    available = count_controls(claim, strata, disjoint=disjoint)
    if not available:
        raise LocationError(
            got=f"a claim of {len(claim)} {claim.kind} that leaves no room for a control",
            expected=f"at least one {'disjoint ' if disjoint else 'other '}set of its size",
            remedy="take a smaller claim, looser matching (match: none), or controls that may overlap it",
        )
    rng = random.Random(seed)
    found: dict[tuple, Location] = {}
    while len(found) < min(n, available):
        units = [unit for stratum, k in sorted(wanted.items()) for unit in rng.sample(free[stratum], k)]
        location = Location(tuple(units), claim.kind)
        if location.units != claim.units:
            found.setdefault(location.units, location)
    return list(found.values())


def count_controls(claim: Location, strata: Mapping[tuple[int, int], int], *, disjoint: bool = False) -> int:
    """How many locations could be a control: the space that `sample_controls` draws from."""
    taken = set(claim.units) if disjoint else set()
    room = Counter(stratum for unit, stratum in strata.items() if unit not in taken)
    wanted = Counter(strata[unit] for unit in claim.units)
    return prod(comb(room[stratum], k) for stratum, k in wanted.items()) - (not disjoint)
