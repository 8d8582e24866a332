"""Kinds of places: how a site is cut into units, and how controls of a claim are drawn.

A site is where the model has a vector; a kind says what a unit is there. Units of the built-in kinds are equal blocks
of a site's coordinates:

    head, kv-group, attention    of ``heads``: one head, the heads that share keys and values, all heads of a layer
    neuron, mlp                  of ``neurons``: one neuron, all neurons of a layer
    residual                     of ``residual``: a layer's stream

Another kind is one class with the methods of `Kind`, registered in `locaudit.registry.KINDS`; its units may be anything
with a name, and lie in any subspace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from locaudit.claims.controls import Strata, count_controls, sample_controls
from locaudit.errors import LocationError
from locaudit.location import Location, Site, Unit, order_of, read_numbers, spell_unit
from locaudit.registry import KINDS

Match = Literal["none", "layer", "kv-group", "probe-accuracy", "norm"]
"""What controls share with the claim."""
N_BINS, LEAST_IN_BIN = 10, 4
"""Bins of matching by a value, and units that a bin has at least: a model of few units has fewer bins."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    n_layers: int
    n_heads: int
    """Query heads a layer."""
    n_kv_heads: int
    """Groups of heads that share keys and values, a layer."""
    head_dim: int
    n_neurons: int
    """Hidden neurons of a layer's MLP."""
    width: int
    """Of the residual stream."""


class Controls(NamedTuple):
    """Controls of a claim, and of how many they were drawn (None: infinitely many, or too many to count)."""

    locations: list[Location]
    population: int | None


class Kind(Protocol):
    """A kind of place."""

    @property
    def plural(self) -> str:
        """What several units are called."""
        ...

    @property
    def site(self) -> str:
        """Name of the site that its units lie in."""
        ...

    def parse_unit(self, part: object) -> Unit:
        """A unit from text or numbers; `LocationError` for what is none."""
        ...

    def n_units(self, shape: Shape) -> int | None:
        """Units in the model; None for infinitely many."""
        ...

    def check(self, location: Location, shape: Shape) -> None:
        """Raise `LocationError` if a unit lies outside a model of this shape."""
        ...

    def subspaces(self, location: Location, shape: Shape) -> dict[Site, NDArray]:
        """Where in each site's vector (d,) the location is; sites that it does not touch are left out.

        A mask of coordinates (d,), bool; or a basis (d, k) of orthonormal columns.
        """
        ...

    def blocks(self, shape: Shape) -> tuple[int, int] | None:
        """(units a layer, coordinates a unit) where units cut each layer's coordinates into equal blocks, in order.

        None for other kinds: they have no probes and no ITI directions.
        """
        ...

    def heads_worth(self, location: Location, shape: Shape) -> float:
        """Size of the location in heads, by which a starting learning rate is chosen."""
        ...

    def draw(
        self, claim: Location, shape: Shape, n: int, *, seed: int, match: Match, disjoint: bool, values: NDArray | None
    ) -> Controls:
        """`n` controls of the claim; the first k are the same for every n. `values` (layers, units) for matching."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Units that are equal blocks of a site's coordinates: ``(layer, block)``, or ``(layer,)`` for one a layer."""

    plural: str
    site: str
    per_layer: Callable[[Shape], int]
    """Units a layer."""
    coordinates: Callable[[Shape], int]
    """Coordinates a unit."""
    worth: Callable[[Shape], float]
    """Heads that a unit is worth."""
    whole_layers: bool = False
    """Whether a unit is a whole layer, named by its number alone."""

    def parse_unit(self, part: object) -> Unit:
        """``14.3``, ``(14, 3)``; ``14`` where a unit is a layer."""
        numbers = read_numbers(part, 1 if self.whole_layers else 2)
        if numbers is None:
            form = "a layer's number, like 14" if self.whole_layers else "LAYER.UNIT with whole numbers, like 14.3"
            remedy = "write a claim as '14.3,15.7' or 'mlp:8', or give a JSON or CSV file"
            if isinstance(part, list | tuple | Mapping):
                remedy = "write each unit so, without a score, and keep only those that are the claim"
            raise LocationError(
                got=f"the unit {part!r}",
                expected=form if self.whole_layers else f"{form}, or a pair [14, 3]",
                remedy=remedy,
            )
        return numbers

    def units(self, shape: Shape) -> list[Unit]:
        """Every unit, by layer, then block."""
        layers = range(shape.n_layers)
        if self.whole_layers:
            return [(layer,) for layer in layers]
        return [(layer, unit) for layer in layers for unit in range(self.per_layer(shape))]

    def n_units(self, shape: Shape) -> int:
        """Units in the model."""
        return shape.n_layers * self.per_layer(shape)

    def blocks(self, shape: Shape) -> tuple[int, int]:
        """(units a layer, coordinates a unit)."""
        return self.per_layer(shape), self.coordinates(shape)

    def heads_worth(self, location: Location, shape: Shape) -> float:
        """Size in heads; the whole model's is that of all its heads."""
        every = self.n_units(shape)
        n = {"listed": len(location), "whole": every, "rest": every - len(location)}[location.scope]
        return n * self.worth(shape)

    def check(self, location: Location, shape: Shape) -> None:
        """Every unit is in the model, and of ``rest`` something is left."""
        n = self.per_layer(shape)
        bad = [u for u in location.units if isinstance(u, str) or u[0] >= shape.n_layers or _place(u)[1] >= n]
        if bad:
            units = "" if self.whole_layers else f" and {self.plural} 0-{n - 1}"
            raise LocationError(
                got=f"{self.plural} {', '.join(map(spell_unit, bad[:5]))}{' ...' if len(bad) > 5 else ''}",
                expected=f"layers 0-{shape.n_layers - 1}{units} (this model's shape)",
                remedy="check the claim's numbering (layer.unit, both from 0) and the model it was made for",
            )
        if location.scope == "rest" and len(location) >= self.n_units(shape):
            raise LocationError(
                got=f"all but every one of the model's {self.plural}", expected="something left", remedy="claim less"
            )

    def subspaces(self, location: Location, shape: Shape) -> dict[Site, NDArray]:
        """Masks (d,) of coordinates."""
        self.check(location, shape)
        per_layer, width = self.blocks(shape)
        chosen = np.full((shape.n_layers, per_layer), location.scope != "listed")
        for unit in location.units:
            layer, block = _place(unit)
            chosen[layer, block] = location.scope == "listed"
        return {Site(self.site, i): np.repeat(row, width) for i, row in enumerate(chosen) if row.any()}

    def strata(self, match: Match, shape: Shape, values: Sequence[Sequence[float]] | NDArray | None = None) -> Strata:
        """Stratum of every unit: a control has as many units in each stratum as the claim.

        ``none``: one stratum. ``layer``: the layer. ``kv-group``: heads of a layer that share keys and values.
        ``probe-accuracy`` and ``norm``: up to `N_BINS` bins of equal size by rank of `values` (layers x units); ties by
        layer, then unit.
        """
        units = self.units(shape)
        if match == "none":
            return dict.fromkeys(units, 0)
        if match == "layer":
            return {unit: _place(unit)[0] for unit in units}
        if match == "kv-group":
            groups = shape.n_kv_heads if self.site == "heads" else self.per_layer(shape)
            width = max(self.per_layer(shape) // groups, 1)
            return {
                unit: layer * groups + block // width
                for unit, (layer, block) in zip(units, map(_place, units), strict=True)
            }
        if values is None:
            raise LocationError(
                got=f"matching by {match} without its values",
                expected="a value for every unit",
                remedy="pass values (layers x units)",
            )
        value = dict(zip(units, np.asarray(values, dtype=float).ravel().tolist(), strict=True))
        ranked = sorted(units, key=lambda unit: (value[unit], order_of(unit)))
        n_bins = max(1, min(N_BINS, len(ranked) // LEAST_IN_BIN))
        return {unit: rank * n_bins // len(ranked) for rank, unit in enumerate(ranked)}

    def draw(
        self, claim: Location, shape: Shape, n: int, *, seed: int, match: Match, disjoint: bool, values: NDArray | None
    ) -> Controls:
        """Random sets of as many units in each stratum, drawn as `sample_controls` says."""
        self.check(claim, shape)
        strata = self.strata(match, shape, values)
        found = sample_controls(claim, strata, n, seed=seed, disjoint=disjoint)
        return Controls(found, count_controls(claim, strata, disjoint=disjoint))


def _place(unit: Unit) -> tuple[int, int]:
    """(layer, block); a unit that is a whole layer is its block 0."""
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
    "mlp": Blocks("MLP layers", "neurons", lambda s: 1, lambda s: s.n_neurons, lambda s: s.n_heads, True),
    "residual": Blocks("residual streams", "residual", lambda s: 1, lambda s: s.width, lambda s: s.n_heads, True),
}
"""Learning rates were measured for heads (docs/learning-rates.md); other kinds start at those of as many heads."""
for _name, _kind in BUILT_IN.items():
    KINDS.register(_name)(_kind)


def find_kind(location: Location) -> Kind:
    """The location's kind; `ConfigError` for one that no plug-in has registered."""
    return KINDS[location.kind]
