"""Directions: vectors in the residual stream after a layer or at a layer's heads, of which k span a subspace.

A unit is ``LAYER.NAME#HASH``, such as ``14.refusal#9f86d081884c7d65``. The hash identifies the vector, and `VECTORS`
holds it: vectors are too long to be part of names. A run folder keeps the vectors of its claim and controls
(`locaudit.store.directions`). The controls of a null, for a claim of k vectors, are sets of k vectors

    covariance   from N(0, C), C the covariance of the activations at the site, at the last token of training examples
    uniform      uniform on the sphere
    dictionary   other rows of the claim's file
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from locaudit.claims.controls import count_controls, sample_controls
from locaudit.claims.kinds import BUILT_IN, Controls, Shape, no_such_null
from locaudit.errors import ConfigError, LocationError
from locaudit.location import Location, Site, Unit
from locaudit.records import DIRECTION_NULLS, NullId, content_hash
from locaudit.registry import KINDS
from locaudit.text import plural

VECTORS: dict[str, NDArray] = {}
"""Vectors (d,) that this process knows, by hash. An entry never changes: a hash stands for one vector."""
DICTIONARIES: dict[str, Dictionary] = {}
"""Claim, as text -> the rows of the file that it comes from."""
_UNIT = re.compile(r"\s*(\d+)\.([\w.-]+)#([0-9a-f]{16})\s*", re.ASCII)
_HOW = "FILE@LAYER or FILE[ROW,...]@LAYER, with a safetensors, npz, npy or pt file of vectors"


@dataclass(frozen=True)
class Directions:
    """A kind whose units are vectors at a site. The vectors of a location are in one layer; it is their span."""

    site: str
    like: str
    """The kind whose units are whole layers of the same site."""
    plural: str = "directions"

    def pace(self, location: Location) -> float:
        """That of as many heads for directions (docs/learning-rates.md); else that of whole layers."""
        return 1.0 if location.scope == "listed" else BUILT_IN[self.like].pace(location)

    def parse_unit(self, part: object) -> str:
        """Read a unit such as ``14.refusal#9f86d081884c7d65``."""
        if not (found := _UNIT.fullmatch(str(part))):
            raise LocationError(got=f"{part!r} as a direction", expected=_HOW, remedy="write it so; layers are from 0")
        return found[0].strip()

    def n_units(self, shape: Shape) -> None:
        """There are infinitely many directions."""

    def blocks(self, shape: Shape) -> None:
        """Directions are no blocks of coordinates."""

    def heads_worth(self, location: Location, shape: Shape) -> float:
        """As many heads as a layer has: the edit can be as large as that of all of the layer's site."""
        layers = BUILT_IN[self.like]
        one = location.scope == "listed"
        return layers.heads_worth(Location(((0,),), self.like) if one else Location.whole(self.like), shape)

    def check(self, location: Location, shape: Shape) -> None:
        """Raise `LocationError` for unknown vectors, several layers, or vectors that do not fit a model or repeat."""
        if location.scope == "whole":
            return
        width, layers = BUILT_IN[self.like].blocks(shape)[1], sorted({_layer(unit) for unit in location.units})
        if len(layers) > 1 or layers[0] >= shape.n_layers:
            raise LocationError(
                got=f"directions in layer {', '.join(map(str, layers))}",
                expected=f"directions in one of the layers 0-{shape.n_layers - 1} (this model's shape)",
                remedy="check the layer's number, which counts from 0, and which model the vectors were made for",
            )
        vectors = _vectors(location)
        wrong = next((len(v) for v in vectors if len(v) != width), None)
        if wrong is not None:
            raise LocationError(
                got=f"a direction of {plural(wrong, 'coordinate')}",
                expected=f"{width}, the width of {self.site} in this model",
                remedy="check which model and site it was made for; heads-direction:FILE@LAYER is at a layer's heads",
            )
        k = len(vectors)
        if k >= width or np.linalg.matrix_rank(_unit_rows(vectors)) < k:
            raise LocationError(
                got=f"{k} directions that do not span a subspace of {k} of the {width} dimensions",
                expected="linearly independent directions, fewer than dimensions",
                remedy="leave out those that follow from the others",
            )

    def subspaces(self, location: Location, shape: Shape) -> dict[Site, NDArray]:
        """An orthonormal basis (d, k) of the span in its layer.

        For ``rest``, this layer has a basis of what is orthogonal to the span. Other layers are masks of all
        coordinates, as every layer is for ``whole``.
        """
        every = BUILT_IN[self.like].subspaces(Location.whole(self.like), shape)
        if location.scope == "whole":
            return every
        self.check(location, shape)
        rows = _unit_rows(_vectors(location))
        basis, _ = np.linalg.qr(rows.T, mode="reduced" if location.scope == "listed" else "complete")
        own = Site(self.site, _layer(location.units[0]))
        return {own: basis} if location.scope == "listed" else {**every, own: basis[:, len(rows) :]}

    def draw(
        self, claim: Location, shape: Shape, n: int, *, seed: int, null: NullId, disjoint: bool, values: NDArray | None
    ) -> Controls:
        """Draw directions in the claim's layer.

        For ``covariance``, `values` is X (examples, d), activations of the layer minus their mean. A drawn vector is
        X^T z with standard normal z, whose covariance is X^T X.
        """
        self.check(claim, shape)
        layer, k = _layer(claim.units[0]), len(claim)
        if null == "dictionary":
            return _draw_rows(claim, n, seed=seed, disjoint=disjoint)
        if null not in DIRECTION_NULLS or (null == "covariance" and values is None):
            raise no_such_null(null, self.plural, DIRECTION_NULLS)
        width = len(_vectors(claim)[0]) if values is None else len(values)
        source = width if values is None else hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
        locations = []
        for i in range(n):
            # Named by what they are drawn from, so that a run that is continued on another machine, where the last
            # digits of X^T z may differ, finds the vectors in its folder.
            keys = [content_hash([null, source, seed, i, j]) for j in range(k)]
            if not all(key in VECTORS for key in keys):
                z = np.random.default_rng([seed, i]).standard_normal((k, width))
                drawn = (z if values is None else z @ values).astype(np.float32)
                VECTORS.update(zip(keys, drawn, strict=True))
            units = [f"{layer}.{null}-{i}{f'-{j}' if k > 1 else ''}#{key}" for j, key in enumerate(keys)]
            locations.append(Location(tuple(units), claim.kind))
        return Controls(locations, None)


KINDS.register("direction")(Directions("residual", "residual"))
KINDS.register("heads-direction")(Directions("heads", "attention"))


@dataclass(frozen=True, eq=False)
class Dictionary:
    """The usable rows of a file with directions, of which a claim's are some."""

    size: int
    claimed: tuple[int, ...]
    """Numbers of the claim's rows."""
    known: dict[int, str]
    """Number of a row -> its unit, for the rows that are kept without the file."""
    names: Sequence[str] = ()
    rows: NDArray = field(default_factory=lambda: np.zeros((0, 0)))
    """All rows (size, d); none if the file was not read."""

    def unit(self, number: int, layer: int) -> str:
        """The unit of a row, whose vector is then in `VECTORS`. Raises `ConfigError` if the file is needed."""
        if number not in self.known:
            if not len(self.rows):
                raise ConfigError(
                    got="more rows of the dictionary than the run folder holds",
                    expected="the file that the claim comes from",
                    remedy="write the claim as FILE[ROW]@LAYER again, or leave controls as they were",
                )
            self.known[number] = name_vector(layer, self.names[number], self.rows[number])
        return self.known[number]


def name_vector(layer: int, name: str, vector: NDArray) -> str:
    """Put a vector into `VECTORS` and return its unit."""
    vector = np.ascontiguousarray(vector, dtype=np.float32)
    key = hashlib.sha256(vector.tobytes()).hexdigest()[:16]
    VECTORS.setdefault(key, vector)
    return f"{layer}.{re.sub(r'[^A-Za-z0-9_.-]+', '_', name) or 'vector'}#{key}"


def vectors_of(locations: Sequence[Location]) -> dict[str, NDArray]:
    """The vectors of the directions among the locations, by hash."""
    units = {unit for place in locations if isinstance(KINDS[place.kind], Directions) for unit in place.units}
    return {key: VECTORS[key] for key in sorted(str(unit).rpartition("#")[2] for unit in units)}


def claim_rows(
    arrays: Mapping[str, NDArray], layer: int, rows: str | Sequence[object], kind: str, source: str
) -> Location:
    """The location of the vectors that `rows` names among the arrays, whose other rows are then its dictionary.

    A row of an array (rows, d) is called ``NAME.NUMBER``, or ``NUMBER`` if there is no other array; an array (d,) is a
    row itself. `rows` is ``a,b``, a sequence, ``*`` for all, or empty if there is only one. Raises `LocationError`.
    """
    tables = _tables(arrays)
    wanted = [part.strip() for part in rows.split(",")] if isinstance(rows, str) else [str(row) for row in rows]
    every = [name for names, _ in tables for name in names]
    if wanted == ["*"] or (wanted == [""] and len(every) == 1):
        wanted = every
    missing = [name for name in wanted if name not in set(every)]
    shown = ", ".join(every[:8]) + (", ..." if len(every) > 8 else "")
    if missing or not every:
        near = difflib.get_close_matches(missing[0], every, n=3) if missing else []
        raise LocationError(
            got=f"{source} without the row {missing[0]}"
            if missing != [""]
            else f"{source} with {plural(len(every), 'row')}, of which none is named",
            expected=f"rows among {shown or 'arrays (d,) or (rows, d) of numbers'}",
            remedy=f"did you mean {' or '.join(near)}?"
            if any(near)
            else "write FILE[ROW]@LAYER, several rows as FILE[ROW,ROW]@LAYER, or the span of all as FILE[*]@LAYER",
        )
    if twice := [name for name in wanted if every.count(name) > 1]:
        raise LocationError(
            got=f"the row {twice[0]} of {source}, which may be an array of this name or a row of another array",
            expected="names that stand for one row",
            remedy="save the array under another name",
        )
    names, table = next(((names, x) for names, x in tables if set(wanted) <= set(names)), ((), None))
    if table is None:
        raise LocationError(
            got=f"the rows {', '.join(wanted[:8])} of {source}, which are of different arrays or widths",
            expected="rows of one array (rows, d), or arrays (d,) of one size",
            remedy="claim the rows of one array",
        )
    number = {name: i for i, name in enumerate(names)}
    if table.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            table = table.astype(np.float32)  # as `VECTORS` holds them
    usable = np.logical_and(np.isfinite(table).all(axis=1), np.any(table, axis=1)).tolist()
    bad = next((name for name in wanted if not usable[number[name]]), None)
    if bad is not None:
        raise LocationError(
            got=f"the row {bad} of {source}, which is zero or has NaN or infinity in float32",
            expected="a direction: finite numbers, some of them not zero",
            remedy="correct it (its length does not matter, so that it can be divided by it), or claim another row",
        )
    place = Location(tuple(name_vector(layer, name, table[number[name]]) for name in wanted), kind)
    kept = np.flatnonzero(usable)
    claimed = tuple(np.searchsorted(kept, [number[name] for name in wanted]).tolist())
    DICTIONARIES[str(place)] = Dictionary(
        len(kept), claimed, {}, [names[i] for i in kept], table if all(usable) else table[kept]
    )
    return place


def _tables(arrays: Mapping[str, NDArray]) -> list[tuple[list[str], NDArray]]:
    """Names and rows (rows, d): of each array with two axes, and of all arrays with one axis and the same size."""
    numeric = {name: x for name, x in arrays.items() if x.dtype.kind in "fiu" and x.size}
    found, alone = [], {}
    for name, x in numeric.items():
        if x.ndim == 2:
            found.append(([str(i) if len(arrays) == 1 else f"{name}.{i}" for i in range(len(x))], x))
        elif x.ndim == 1:
            alone.setdefault(len(x), {})[name] = x
    return [*found, *((list(group), np.stack(list(group.values()))) for group in alone.values())]


def _draw_rows(claim: Location, n: int, *, seed: int, disjoint: bool) -> Controls:
    """Draw sets of rows of the claim's dictionary, as units of other kinds are drawn."""
    found = DICTIONARIES.get(str(claim))
    if found is None or found.size == len(claim):
        raise LocationError(
            got="a direction that is no row of a dictionary",
            expected="a file with other rows",
            remedy="use the nulls covariance or uniform, or give the dictionary's file as FILE[ROW]@LAYER",
        )
    rows = Location(tuple((i,) for i in found.claimed), claim.kind)
    strata: dict[Unit, int] = {(i,): 0 for i in range(found.size)}
    drawn, layer = sample_controls(rows, strata, n, seed=seed, disjoint=disjoint), _layer(claim.units[0])
    sets = [tuple(found.unit(int(i), layer) for (i,) in place.units) for place in drawn]  # type: ignore[misc]
    return Controls([Location(units, claim.kind) for units in sets], count_controls(rows, strata, disjoint=disjoint))


def _layer(unit: object) -> int:
    return int(str(unit).partition(".")[0])


def _vectors(location: Location) -> list[NDArray]:
    keys = [str(unit).rpartition("#")[2] for unit in location.units]
    if lost := [unit for unit, key in zip(location.units, keys, strict=True) if key not in VECTORS]:
        raise LocationError(
            got=f"the direction {lost[0]}, whose vector is not known here",
            expected=_HOW,
            remedy="give the file, or the folder of its run as --out",
        )
    return [VECTORS[key] for key in keys]


def _unit_rows(vectors: Sequence[NDArray]) -> NDArray:
    rows = np.stack(vectors).astype(float)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
