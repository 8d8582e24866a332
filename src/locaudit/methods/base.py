"""What a method is: a name, settings, and a function that finds edits. No torch here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from locaudit.errors import ConfigError
from locaudit.location import Location


@dataclass(frozen=True)
class Job:
    """One edit to find."""

    location: Location
    strength: float | None
    """A value of the method's grid; None for a method without one."""
    seed: int
    """Of the order of questions and the initial reader: the same for a claim and its controls."""
    draw: int | None = None
    """Number of a random direction at the location (`Method.null`); None for the edit itself."""


@dataclass(frozen=True, eq=False)
class Fit:
    """What a method found for a `Job`."""

    edit: Any
    """The `locaudit.edits.Edit`; None, with a message, if its loss or gradient stopped being finite."""
    losses: tuple[float, ...] = ()
    """Mean loss over the pairs of each step; empty where nothing is trained."""
    message: str = ""


@dataclass(frozen=True)
class Method:
    """A way of finding an edit. Add one with ``METHODS.register(name)(Method(...))``: nothing else names it."""

    title: str
    """What readers call it, for example ``Optimal edit``."""
    settings: type
    """A dataclass whose fields all have defaults and docstrings: keys of ``methods.NAME`` in YAML, and flags."""
    fit: Callable[..., Sequence[Any]] | str
    """``fit(shared, jobs, settings, on_step=None) -> [Fit, ...]``, a `Fit` a job; or ``"module:function"``, imported
    when first used. `shared` is the worker's `locaudit.run.worker.Shared`: model, data, and what is computed once."""
    prepare: Callable[..., Any] | str = ""
    """``prepare(preparing, settings) -> {name: tensor}``: what all its edits share, computed once, kept in the run
    folder and found in ``shared.prepared[method]``. `preparing` is `locaudit.run.prepare.Preparing`. Empty: nothing."""
    grid: str = ""
    """Field of the settings that holds the strengths tried; validation chooses one. Empty: one edit."""
    symbol: str | Callable[[Any], str] = ""
    """Of the strength, for example ``α``; may depend on the settings."""
    supports: Literal["higher", "lower"] = "higher"
    """Whether higher or lower scores support the claim."""
    null: Literal["places", "directions"] = "places"
    """Controls are random places of the claim's kind and size, or random directions at the claim (`Job.draw`)."""
    whole: bool = True
    """Whether the whole model is edited too, as the ceiling."""
    rest: bool = False
    """Whether everything but the claim is edited too: is the claim needed?"""
    trained: bool = False
    """Whether edits are trained, several in one bank."""

    def __post_init__(self):
        names = [field.name for field in fields(self.settings)]
        if self.grid and self.grid not in names:
            raise ConfigError(
                got=f"the grid {self.grid!r} of the method {self.title!r}",
                expected=f"a field of {self.settings.__name__}: {', '.join(names)}",
                remedy="name one of them",
            )

    def strengths(self, settings: Any) -> tuple[float | None, ...]:
        """The grid of these settings; ``(None,)`` for a method without strengths."""
        return tuple(getattr(settings, self.grid)) if self.grid else (None,)

    def symbol_of(self, settings: Any) -> str:
        """The strength's symbol under these settings."""
        return self.symbol(settings) if callable(self.symbol) else self.symbol

    @property
    def fitter(self) -> Callable[..., Sequence[Any]]:
        """The function behind `fit`."""
        return _function(self.fit)

    @property
    def preparer(self) -> Callable[..., Any] | None:
        """The function behind `prepare`; None without one."""
        return _function(self.prepare) if self.prepare else None


def _function(named: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Objective:
    """A loss over (true, false) answer pairs."""

    loss: Callable[[Any, float], Any]
    """``loss(margin, strength)``, elementwise: margin h = r(y+) - r(y-) (pairs,), strength a number."""
    symbol: str
    """Of the strength, for example ``τ``."""
