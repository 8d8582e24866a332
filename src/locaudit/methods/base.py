"""What a method is: a name, settings, and a function that finds edits. No torch here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

    def strengths(self, settings: Any) -> tuple[float | None, ...]:
        """The grid of these settings; ``(None,)`` for a method without strengths."""
        return tuple(getattr(settings, self.grid)) if self.grid else (None,)

    def symbol_of(self, settings: Any) -> str:
        """The strength's symbol under these settings."""
        return self.symbol(settings) if callable(self.symbol) else self.symbol

    @property
    def fitter(self) -> Callable[..., Sequence[Any]]:
        """The function behind `fit`."""
        if not isinstance(self.fit, str):
            return self.fit
        module, _, name = self.fit.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Objective:
    """A loss over (true, false) answer pairs."""

    loss: Callable[[Any, float], Any]
    """``loss(margin, strength)``, elementwise: margin h = r(y+) - r(y-) (pairs,), strength a number."""
    symbol: str
    """Of the strength, for example ``τ``."""
