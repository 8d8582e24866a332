"""A ranking: a score of every unit of a kind, from which the k best are the claim."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locaudit.claims.tables import UNIT_COLUMNS, Found
from locaudit.location import Location, Unit, spell_unit
from locaudit.registry import KINDS


def units_of(kind: str, n_layers: int, n_units: int) -> list[Unit]:
    """All units of a kind with `n_units` in each layer, by layer: ``(layer,)`` if each is a whole layer."""
    whole = n_units == 1 and KINDS[kind].whole_layers
    return [(layer,) if whole else (layer, unit) for layer in range(n_layers) for unit in range(n_units)]


@dataclass(frozen=True)
class Ranking:
    """Scores of all units of a kind, from best to worst; equal scores are ordered by layer, then unit."""

    kind: str
    """Kind of the units, such as ``head``."""
    by: str
    """Name of the rule, such as ``gradient``."""
    means: str
    """What a score is, in words."""
    scores: Mapping[Unit, float]
    """Unit -> score. Units with high scores are good places."""
    changes: Mapping[Unit, float] | None = None
    """Unit -> the change of which the score is the size, for rules that find a change; else None."""

    @classmethod
    def of(
        cls, kind: str, by: str, means: str, table: Sequence[Sequence[float]], *, is_change: bool = False
    ) -> Ranking:
        """Rank the units of a kind by a table (layers x units) of scores, or of changes, which are ranked by size."""
        units, values = units_of(kind, len(table), len(table[0])), [value for row in table for value in row]
        found = dict(zip(units, values, strict=True))
        score = {unit: abs(value) if is_change else value for unit, value in found.items()}
        order = sorted(found, key=lambda unit: (-score[unit], unit))
        changes = {unit: found[unit] for unit in order} if is_change else None
        return cls(kind, by, means, {unit: score[unit] for unit in order}, changes)

    def __repr__(self) -> str:
        best = ", ".join(f"{spell_unit(unit)} {score:.3g}" for unit, score in list(self.scores.items())[:5])
        return f"Ranking({len(self.scores)} {KINDS[self.kind].plural} by {self.by}; best {best})"

    def top(self, k: int) -> Location:
        """The k best units, as a claim. Raises `LocationError` if k is not between 1 and the number of units."""
        return Found(tuple(self.scores), self.kind, tuple(self.scores.values())).choose(k, None)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per unit, best first, with ``layer``, ``head`` (or ``neuron``, ...), ``score`` and ``change``.

        There is no second column for units that are whole layers, and ``change`` only for rules that find one.
        ``pandas.DataFrame(ranking.rows)`` makes a table of them.
        """
        names = ("layer", *UNIT_COLUMNS.get(self.kind, ("unit",))[:1])
        rows = []
        for unit, score in self.scores.items():
            row: dict[str, Any] = dict(zip(names, unit, strict=False)) | {"score": score}
            rows.append(row | ({"change": self.changes[unit]} if self.changes else {}))
        return rows

    def save(self, path: str | Path) -> None:
        """Write `rows` as CSV, a file that ``--claim FILE --claim-top-k K`` reads (``--claim mlp:FILE`` for MLPs)."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
