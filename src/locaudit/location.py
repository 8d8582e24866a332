"""Locations: the place in a model where an edit acts, as a set of units of one kind.

A unit, such as an attention head, is named by a tuple of whole numbers such as ``(layer, head)``, or by a text. Its
kind defines what the name means, which coordinates the unit has, and how controls are drawn (`locaudit.claims.kinds`).
"The whole model" and "everything but the claim" are scopes of a location, so that not all of their units need to be
listed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from locaudit.errors import LocationError
from locaudit.text import plural

Unit = tuple[int, ...] | str
"""``(14, 3)``: layer and head, counted from 0; ``(8,)``: a layer; ``"refusal"``: a name."""
Scope = Literal["listed", "whole", "rest"]
Positions = Literal["all", "prompt", "answer", "last", "subject"]
"""Tokens that an edit acts on. ``all``: every token. ``prompt``: those before the answer. ``answer``: the last prompt
token and all after it. ``last``: the last prompt token. ``subject``: the last token of the question's subject."""
ROLES: Mapping[Positions, int] = {"all": -1, "prompt": 1, "answer": 2, "last": 4, "subject": 8}
"""The bit of each kind of token. A token's role is the sum of its bits; 0 is padding."""
IN_TEXT: tuple[Positions, ...] = ("all", "answer")
"""Positions that running text has, too: an edit of ``answer`` acts on all of it."""
UNITS_SHOWN = 40
"""Number of units of a location that a report lists."""


SITES = ("heads", "neurons", "residual")
"""Names of sites: the vectors in each layer that can be edited (see `Site`)."""


class Site(NamedTuple):
    """A vector in one layer of the model, at every token."""

    name: str
    """``heads``: input of the attention output projection (all heads' outputs, concatenated). ``neurons``: input of the
    MLP's down projection. ``residual``: the residual stream after the layer."""
    layer: int
    """The decoder layer, from 0."""


@dataclass(frozen=True)
class Location:
    """A set of units of one kind (sorted), the whole model, or everything but a set of units.

    Raises `LocationError` for a location that is empty, has a negative number, or names a unit twice.
    """

    units: tuple[Unit, ...] = ()
    kind: str = "head"
    """Name of the kind of the units, such as ``head``."""
    scope: Scope = "listed"
    """``listed``: these units; ``whole``: all units of the model (`units` is empty); ``rest``: all but these units."""

    def __post_init__(self):
        units = tuple(unit if isinstance(unit, str) else tuple(int(x) for x in unit) for unit in self.units)
        if bool(units) == (self.scope == "whole"):
            raise LocationError(
                got="an empty location" if not units else f"the whole model and {plural(len(units), 'unit')}",
                expected="at least one unit" if not units else "either the whole model or a list of units",
                remedy="name units like '14.3,15.7'",
            )
        if any(x < 0 for unit in units if not isinstance(unit, str) for x in unit):
            raise LocationError(
                got=f"a negative number in {units}", expected="layers and units from 0", remedy="count from 0"
            )
        repeated = [spell_unit(unit) for unit, n in Counter(units).items() if n > 1]
        if repeated:
            raise LocationError(
                got=f"{', '.join(sorted(repeated))} named more than once",
                expected="each unit once",
                remedy="remove the repeats",
            )
        object.__setattr__(self, "units", tuple(sorted(units, key=order_of)))

    @classmethod
    def whole(cls, kind: str = "head") -> Location:
        """The location of all units of a kind."""
        return cls((), kind, "whole")

    def rest(self) -> Location:
        """The location of all units but these."""
        return Location(self.units, self.kind, "rest")

    def __len__(self) -> int:
        """Number of units in the list. ``rest`` lists the units that are left out; ``whole`` lists none."""
        return len(self.units)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Location({short_location(str(self), 8)!r})"

    def __str__(self) -> str:
        """The location as text: ``14.3,15.7``, ``*`` (the whole model), ``*-14.3`` (all but head 14.3).

        The text begins with the kind, as in ``neuron:3.117``, except for heads.
        """
        text = ",".join(map(spell_unit, self.units))
        text = {"listed": text, "whole": "*", "rest": f"*-{text}"}[self.scope]
        return text if self.kind == "head" else f"{self.kind}:{text}"

    def to_json(self) -> dict[str, Any]:
        """The location as plain JSON values, to be read with `from_json`."""
        units = [unit if isinstance(unit, str) else list(unit) for unit in self.units]
        return {"kind": self.kind, "scope": self.scope, "units": units}

    @staticmethod
    def from_json(value: Mapping[str, Any] | None) -> Location | None:
        """Read a location from `to_json`. None, which stands for the unedited model, stays None."""
        return None if value is None else Location(tuple(value["units"]), value["kind"], value["scope"])


def short_location(text: str, units: int = UNITS_SHOWN) -> str:
    """The location's text; if it has more than `units` units, only these, and a count of the others."""
    parts = text.split(",")
    return text if len(parts) <= units else f"{','.join(parts[:units])}, and {len(parts) - units} more"


def spell_unit(unit: Unit) -> str:
    """A unit as text: ``14.3`` for ``(14, 3)``; a name is unchanged."""
    return unit if isinstance(unit, str) else ".".join(map(str, unit))


def order_of(unit: Unit) -> tuple[int, tuple[int, ...], str]:
    """Sort key of a unit: numbers come before names."""
    return (1, (), unit) if isinstance(unit, str) else (0, unit, "")


_NUMBERS = re.compile(r"^\s*\d+(?:\s*[.:]\s*\d+)*\s*$", re.ASCII)


def read_numbers(part: object, n: int) -> tuple[int, ...] | None:
    """Read `n` whole numbers from ``"14.3"``, ``"14:3"``, ``(14, 3)`` or ``("14", "3")``; None for anything else."""
    if isinstance(part, str):
        found = [int(x) for x in re.split(r"[.:]", part)] if _NUMBERS.match(part) else []
    elif isinstance(part, int) and not isinstance(part, bool):
        found = [part]
    elif isinstance(part, Iterable) and not isinstance(part, Mapping):
        cells = [str(x).strip() for x in part]
        found = [int(x) for x in cells if x.isascii() and x.isdecimal()]
        found = found if len(found) == len(cells) else []
    else:
        found = []
    return tuple(found) if len(found) == n else None
