"""Kinds of places: what a unit is, which coordinates it has, and how controls for a claim are drawn.

A site is a vector in a layer that can be edited (`locaudit.location.Site`). A kind divides sites into units. In the
built-in kinds, a unit is a block of a site's coordinates, and all blocks have the same size:

    kind         site        a unit is
    head         heads       one attention head
    kv-group     heads       the attention heads that share keys and values
    attention    heads       all heads of a layer
    neuron       neurons     one hidden neuron of an MLP
    mlp          neurons     all neurons of a layer
    residual     residual    the residual stream after a layer

The kinds ``direction`` and ``heads-direction`` are in `locaudit.claims.directions`.

To add a kind, register a class with the methods of `Kind` in `locaudit.registry.KINDS`. Its units may have any names
and lie in any subspace of a site.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from locaudit.claims.controls import Strata, count_controls, sample_controls
from locaudit.errors import LocationError
from locaudit.location import Location, Site, Unit, order_of, read_numbers, spell_unit
from locaudit.records import DIRECTION_NULLS, NullId
from locaudit.registry import KINDS

BY_VALUE: tuple[NullId, ...] = ("probe-accuracy", "norm", "covariance")
"""Nulls that need values measured on the model: of every unit, or of the claim's site."""
N_BINS, LEAST_IN_BIN = 10, 4
"""Matching by a value uses `N_BINS` bins, or fewer if a bin would have fewer than `LEAST_IN_BIN` units."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model on which locations depend."""

    n_layers: int
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    """Key-value heads per layer. Each is shared by a group of query heads."""
    head_dim: int
    """Coordinates per head."""
    n_neurons: int
    """Hidden neurons per layer's MLP; 0 if a layer has no single MLP, as in a mixture of experts."""
    width: int
    """Width of the residual stream."""


class Controls(NamedTuple):
    """Controls drawn for a claim, and how many possible controls there are."""

    locations: list[Location]
    population: int | None
    """Number of possible controls; None if there are infinitely many or too many to count."""


class Kind(Protocol):
    """The interface of a kind of place."""

    @property
    def plural(self) -> str:
        """Plural of a unit's name, for texts: ``heads``."""
        ...

    @property
    def site(self) -> str:
        """Name of the site whose vectors the units are part of."""
        ...

    def parse_unit(self, part: object) -> Unit:
        """Read a unit from text or numbers. Raises `LocationError` for anything else."""
        ...

    def n_units(self, shape: Shape) -> int | None:
        """Number of units in the model; None if there are infinitely many."""
        ...

    def check(self, location: Location, shape: Shape) -> None:
        """Raise `LocationError` if a unit lies outside a model of this shape."""
        ...

    def subspaces(self, location: Location, shape: Shape) -> dict[Site, NDArray]:
        """The subspace of each site's vector (d,) that belongs to the location, for the sites that it touches.

        A subspace is a boolean mask (d,) of coordinates or a basis (d, k) with orthonormal columns.
        """
        ...

    def blocks(self, shape: Shape) -> tuple[int, int] | None:
        """(units per layer, coordinates per unit), if units are equal consecutive blocks of a site's coordinates.

        None for other kinds of place. Probes and ITI are not available for these.
        """
        ...

    def heads_worth(self, location: Location, shape: Shape) -> float:
        """Number of heads that the location counts as when the default learning rate is chosen."""
        ...

    def pace(self, location: Location) -> float:
        """Default learning rate of a location, as a multiple of that of as many heads."""
        ...

    def draw(
        self, claim: Location, shape: Shape, n: int, *, seed: int, null: NullId, disjoint: bool, values: NDArray | None
    ) -> Controls:
        """Draw `n` controls of a null for the claim; the first k must be the same for every n.

        `values` (layers, units) are the values to match if `null` is one of `BY_VALUE`, else None; of directions, they
        are activations (examples, d). Raises `LocationError` for a null that has no other place, or that the kind does
        not know, such as ``layers``.
        """
        ...


@dataclass(frozen=True)
class Blocks:
    """A kind whose units are equal blocks of a site's coordinates.

    A unit is ``(layer, block)``, or ``(layer,)`` if it is a whole layer.
    """

    plural: str
    site: str
    per_layer: Callable[[Shape], int]
    """Units per layer."""
    coordinates: Callable[[Shape], int]
    """Coordinates per unit."""
    worth: Callable[[Shape], float]
    """Number of heads that a unit counts as when the default learning rate is chosen."""
    whole_layers: bool = False
    """Whether a unit is a whole layer, named by the layer's number only."""
    multiple: float = 1.0
    """Default learning rate, as a multiple of that of as many heads."""

    def parse_unit(self, part: object) -> Unit:
        """Read a unit from ``"14.3"`` or ``(14, 3)``, or from ``"14"`` if a unit is a whole layer."""
        numbers = read_numbers(part, 1 if self.whole_layers else 2)
        if numbers is None:
            form = "a layer's number, like 14" if self.whole_layers else "LAYER.UNIT with whole numbers, like 14.3"
            remedy = "write a claim as '14.3,15.7' or 'mlp:8', or give a JSON or CSV file"
            if isinstance(part, list | tuple | Mapping):
                remedy = "write each unit like this, without a score, and keep only those that are the claim"
            raise LocationError(
                got=f"the unit {part!r}",
                expected=form if self.whole_layers else f"{form}, or a pair [14, 3]",
                remedy=remedy,
            )
        return numbers

    def units(self, shape: Shape) -> list[Unit]:
        """All units, ordered by layer, then block."""
        layers = range(shape.n_layers)
        if self.whole_layers:
            return [(layer,) for layer in layers]
        return [(layer, unit) for layer in layers for unit in range(self.per_layer(shape))]

    def n_units(self, shape: Shape) -> int:
        """Number of units in the model."""
        return shape.n_layers * self.per_layer(shape)

    def blocks(self, shape: Shape) -> tuple[int, int]:
        """(units per layer, coordinates per unit)."""
        return self.per_layer(shape), self.coordinates(shape)

    def heads_worth(self, location: Location, shape: Shape) -> float:
        """Number of heads that the location counts as; the whole model counts as all its units."""
        every = self.n_units(shape)
        n = {"listed": len(location), "whole": every, "rest": every - len(location)}[location.scope]
        return n * self.worth(shape)

    def pace(self, location: Location) -> float:
        """The same multiple for all locations."""
        return self.multiple

    def check(self, location: Location, shape: Shape) -> None:
        """Raise `LocationError` if the model has no units of this kind, not these units, or if ``rest`` is empty."""
        n = self.per_layer(shape)
        if n * self.coordinates(shape) == 0:
            others = [name for name, kind in BUILT_IN.items() if kind.site != self.site]
            raise LocationError(
                got=f"{self.plural}, of which this model has none (its architecture gives no path of neurons)",
                expected=f"another kind, such as {', '.join(others)}",
                remedy="claim units of one of these kinds",
            )
        bad = [u for u in location.units if isinstance(u, str) or u[0] >= shape.n_layers or _place(u)[1] >= n]
        if bad:
            units = "" if self.whole_layers else f" and {self.plural} 0-{n - 1}"
            name = self.plural if len(bad) > 1 else self.plural.removesuffix("s")
            raise LocationError(
                got=f"{name} {', '.join(map(spell_unit, bad[:5]))}{' ...' if len(bad) > 5 else ''}",
                expected=f"layers 0-{shape.n_layers - 1}{units} (this model's shape)",
                remedy="check the numbering (LAYER.UNIT, both from 0) and which model the claim was made for",
            )
        if location.scope == "rest" and len(location) >= self.n_units(shape):
            raise LocationError(
                got=f"a claim of all {self.plural} of the model",
                expected="some that are not claimed",
                remedy="claim fewer",
            )

    def subspaces(self, location: Location, shape: Shape) -> dict[Site, NDArray]:
        """The location as a boolean mask (d,) of coordinates for each site that it touches."""
        self.check(location, shape)
        per_layer, width = self.blocks(shape)
        # (layers, units): the listed units; all units (``whole``); all but the listed ones (``rest``).
        chosen = np.full((shape.n_layers, per_layer), location.scope != "listed")
        for unit in location.units:
            layer, block = _place(unit)
            chosen[layer, block] = location.scope == "listed"
        return {Site(self.site, i): np.repeat(row, width) for i, row in enumerate(chosen) if row.any()}

    def strata(self, null: NullId, shape: Shape, values: Sequence[Sequence[float]] | NDArray | None = None) -> Strata:
        """The stratum of every unit; a control has as many units in each stratum as the claim.

            anywhere                all units are in one stratum
            layers                  the units of a layer
            kv-groups               the heads of a layer that share keys and values
            probe-accuracy, norm    up to `N_BINS` bins of equal size, by rank of `values` (layers, units); ties are
                                    ordered by layer, then unit

        Raises `LocationError` if values are needed and missing.
        """
        if null in DIRECTION_NULLS:
            raise no_such_null(null, self.plural, ("anywhere", "layers", "kv-groups", "probe-accuracy", "norm"))
        units = self.units(shape)
        if null == "anywhere":
            return dict.fromkeys(units, 0)
        if null == "layers":
            return {unit: _place(unit)[0] for unit in units}
        if null == "kv-groups":
            groups = shape.n_kv_heads if self.site == "heads" else self.per_layer(shape)
            width = max(self.per_layer(shape) // groups, 1)
            return {
                unit: layer * groups + block // width
                for unit, (layer, block) in zip(units, map(_place, units), strict=True)
            }
        if values is None:
            raise LocationError(
                got=f"the null {null} without values",
                expected="a value for every unit",
                remedy="pass values (layers, units)",
            )
        value = dict(zip(units, np.asarray(values, dtype=float).ravel().tolist(), strict=True))
        ranked = sorted(units, key=lambda unit: (value[unit], order_of(unit)))
        n_bins = max(1, min(N_BINS, len(ranked) // LEAST_IN_BIN))
        return {unit: rank * n_bins // len(ranked) for rank, unit in enumerate(ranked)}

    def draw(
        self, claim: Location, shape: Shape, n: int, *, seed: int, null: NullId, disjoint: bool, values: NDArray | None
    ) -> Controls:
        """Draw random sets with as many units in each stratum as the claim; see `sample_controls`."""
        self.check(claim, shape)
        strata = self.strata(null, shape, values)
        found = sample_controls(claim, strata, n, seed=seed, disjoint=disjoint)
        return Controls(found, count_controls(claim, strata, disjoint=disjoint))


def no_such_null(null: str, plural: str, known: Sequence[str]) -> LocationError:
    """The error for a null that a kind does not have."""
    return LocationError(
        got=f"the null {null} for {plural}",
        expected=f"nulls of {plural}: {', '.join(known)}",
        remedy=f"write nulls: [{known[0]}]",
    )


def _place(unit: Unit) -> tuple[int, int]:
    """(layer, block) of a unit; a whole layer is block 0."""
    assert not isinstance(unit, str)  # `Blocks.check` has refused it
    return unit[0], unit[1] if len(unit) > 1 else 0


def _group_size(shape: Shape) -> int:
    return shape.n_heads // shape.n_kv_heads


BUILT_IN: Mapping[str, Blocks] = {
    "head": Blocks("heads", "heads", lambda s: s.n_heads, lambda s: s.head_dim, lambda s: 1),
    "kv-group": Blocks(
        "kv-groups", "heads", lambda s: s.n_kv_heads, lambda s: _group_size(s) * s.head_dim, _group_size
    ),
    "attention": Blocks(
        "attention layers", "heads", lambda s: 1, lambda s: s.n_heads * s.head_dim, lambda s: s.n_heads, True
    ),
    "neuron": Blocks("neurons", "neurons", lambda s: s.n_neurons, lambda s: 1, lambda s: 1),
    "mlp": Blocks("MLP layers", "neurons", lambda s: 1, lambda s: s.n_neurons, lambda s: s.n_neurons, True),
    "residual": Blocks(
        "residual streams", "residual", lambda s: 1, lambda s: s.width, lambda s: s.n_heads, True, multiple=1 / 3
    ),
}
"""The built-in kinds. What a unit counts as, and the rate of residual streams, are from docs/learning-rates.md."""
for _name, _kind in BUILT_IN.items():
    KINDS.register(_name)(_kind)


def find_kind(location: Location) -> Kind:
    """The kind of a location; raises `ConfigError` if no kind of that name is registered."""
    return KINDS[location.kind]


def whole_layers(site: str) -> str:
    """The kind whose units are whole layers of a site."""
    return next(name for name, blocks in BUILT_IN.items() if blocks.site == site and blocks.whole_layers)


def blocks_for(kind: str, shape: Shape) -> str:
    """The kind whose activations are read for a kind: itself, or whole layers of its site if units are no blocks."""
    return kind if KINDS[kind].blocks(shape) is not None else whole_layers(KINDS[kind].site)


def draw_nulls(
    claim: Location,
    shape: Shape,
    nulls: Sequence[NullId],
    n: int,
    *,
    seed: int = 0,
    disjoint: bool = False,
    values: Mapping[NullId, NDArray] | None = None,
) -> tuple[dict[str, Controls], tuple[str, ...]]:
    """Draw `n` controls of each null, or all there are, and say in a sentence each which nulls have none.

    `values` has the values (layers, units) of the nulls in `BY_VALUE`. All nulls use the same seed, so where two have
    the same possible places they draw the same ones. Raises the first `LocationError` if no null has a place.
    """
    found, errors = {}, []
    for null in nulls:
        own = (values or {}).get(null)
        try:
            found[null] = find_kind(claim).draw(claim, shape, n, seed=seed, null=null, disjoint=disjoint, values=own)
        except LocationError as error:
            errors.append((null, error))
    if errors and not found:
        raise errors[0][1]
    return found, tuple(f"There are no controls of the null {null}: {error.got}." for null, error in errors)
