"""A location: units of one kind. A value object from the command line to the record; text only at the edges.

Units are opaque ids: tuples of whole numbers such as ``(layer, head)``, or names. What they mean, which coordinates
they have and how controls are drawn is their kind's business (`locaudit.claims.kinds`). "The whole model" and "all but
the claim" are scopes, not lists of a million units.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from locaudit.errors import LocationError

Unit = tuple[int, ...] | str
"""``(14, 3)``: layer and head, counted from 0; ``(8,)``: a layer; ``"refusal"``: a name."""
Scope = Literal["listed", "whole", "rest"]
UNITS_SHOWN = 40
"""Units of a location that a report spells out."""


SITES = ("heads", "neurons", "residual")
"""Names of sites."""


class Site(NamedTuple):
    """Where a vector is, in which layer."""

    name: str
    """``heads``: input of attention's output projection; ``neurons``: input of the MLP's down projection;
    ``residual``: the stream that leaves the layer."""
    layer: int


@dataclass(frozen=True)
class Location:
    """Units of one kind, sorted and without repeats; or the whole model, or all of it but the units."""

    units: tuple[Unit, ...] = ()
    kind: str = "head"
    """Name of the kind, which says what the units are."""
    scope: Scope = "listed"
    """``listed``: the units; ``whole``: every unit of the model (`units` is empty); ``rest``: every other unit."""

    def __post_init__(self):
        units = tuple(unit if isinstance(unit, str) else tuple(int(x) for x in unit) for unit in self.units)
        if bool(units) == (self.scope == "whole"):
            raise LocationError(
                got="an empty location" if not units else f"the whole model and {len(units)} units",
                expected="at least one unit" if not units else "no units beside the whole model",
                remedy="name units like '14.3,15.7'",
            )
        if any(x < 0 for unit in units if not isinstance(unit, str) for x in unit):
            raise LocationError(
                got=f"a negative index in {units}", expected="layers and units from 0", remedy="count from 0"
            )
        repeated = [spell_unit(unit) for unit, n in Counter(units).items() if n > 1]
        if repeated:
            raise LocationError(
                got=f"{', '.join(sorted(repeated))} named more than once",
                expected="each unit once",
                remedy="drop the repeats: the size of a location sets the size of its controls",
            )
        object.__setattr__(self, "units", tuple(sorted(units, key=order_of)))

    @classmethod
    def whole(cls, kind: str = "head") -> Location:
        """Every unit of that kind in the model."""
        return cls((), kind, "whole")

    def rest(self) -> Location:
        """Everything but these units."""
        return Location(self.units, self.kind, "rest")

    def __len__(self) -> int:
        """Units named: of ``rest``, those left out; 0 of the whole model."""
        return len(self.units)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Location({short_location(str(self), 8)!r})"

    def __str__(self) -> str:
        """``14.3,15.7``, ``neuron:3.117``, ``*`` (the whole model), ``*-14.3`` (all but that); heads have no prefix."""
        text = ",".join(map(spell_unit, self.units))
        text = {"listed": text, "whole": "*", "rest": f"*-{text}"}[self.scope]
        return text if self.kind == "head" else f"{self.kind}:{text}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record; `from_json` is the inverse."""
        units = [unit if isinstance(unit, str) else list(unit) for unit in self.units]
        return {"kind": self.kind, "scope": self.scope, "units": units}

    @staticmethod
    def from_json(value: Mapping[str, Any] | None) -> Location | None:
        """A location from `to_json`; None, the unedited model's, stays None."""
        return None if value is None else Location(tuple(value["units"]), value["kind"], value["scope"])


def short_location(text: str, units: int = UNITS_SHOWN) -> str:
    """The location's text, its tail replaced by a count when it has more than `units` units."""
    parts = text.split(",")
    return text if len(parts) <= units else f"{','.join(parts[:units])}, and {len(parts) - units} more"


def spell_unit(unit: Unit) -> str:
    """``14.3`` for ``(14, 3)``; a name as it is."""
    return unit if isinstance(unit, str) else ".".join(map(str, unit))


def order_of(unit: Unit) -> tuple[int, tuple[int, ...], str]:
    """Sort key: numbers before names."""
    return (1, (), unit) if isinstance(unit, str) else (0, unit, "")


_NUMBERS = re.compile(r"^\s*\d+(?:\s*[.:]\s*\d+)*\s*$", re.ASCII)


def read_numbers(part: object, n: int) -> tuple[int, ...] | None:
    """`n` whole numbers from ``"14.3"``, ``"14:3"``, ``(14, 3)`` or ``("14", "3")``; None for anything else."""
    if isinstance(part, str):
        found = [int(x) for x in re.split(r"[.:]", part)] if _NUMBERS.match(part) else []
    elif isinstance(part, int) and not isinstance(part, bool):
        found = [part]
    elif isinstance(part, Iterable):
        cells = [str(x).strip() for x in part]
        found = [int(x) for x in cells if x.isascii() and x.isdecimal()]
        found = found if len(found) == len(cells) else []
    else:
        found = []
    return tuple(found) if len(found) == n else None
