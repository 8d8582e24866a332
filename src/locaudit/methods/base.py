"""The interface of a method: a title, settings and a function that finds edits. This file does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from locaudit.errors import ConfigError
from locaudit.location import Location

PatchWith = Literal["mean", "pair"]
"""What a rule replaces a unit's output by: its mean over the training texts, or its value after the paired prompt."""


@dataclass(frozen=True)
class Job:
    """One edit to find: at which location, with which strength and seed."""

    location: Location
    strength: float | None
    """A value of the method's grid of strengths; None for a method without a grid."""
    seed: int
    """Seed for the order of training questions and for the initial A. The claim and its controls have the same seed."""
    draw: int | None = None
    """Number of the random direction at the location, if controls are directions (`Method.null`); else None."""


@dataclass(frozen=True, eq=False)
class Fit:
    """The result of a `Job`."""

    edit: Any
    """The `locaudit.edits.Edit`; None, with a `message`, if a loss, gradient or edit became NaN or infinite."""
    losses: tuple[float, ...] = ()
    """For each training step, the mean loss over its answer pairs; empty if nothing is trained."""
    message: str = ""
    """Why there is no edit; empty if there is one."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Numbers about the fit for the trial's record, such as the ``objective`` that training reached."""


@dataclass(frozen=True)
class Method:
    """A way of finding edits. ``METHODS.register(name)(Method(...))`` adds one; no other code has to name it."""

    title: str
    """Name in reports, for example ``Optimal edit``."""
    settings: type
    """A dataclass whose fields all have defaults and docstrings. The fields become keys of ``methods.NAME`` in YAML and
    flags of the command line."""
    fit: Callable[..., Sequence[Any]] | str
    """``fit(shared, jobs, settings, on_step=None)`` returns one `Fit` per job. `shared` is a
    `locaudit.run.worker.Shared` with the model, the data and everything that is computed once for all trials.
    ``on_step(done, total)`` reports progress. Instead of the function, its name ``"module:function"`` can be given; it
    is imported at first use."""
    prepare: Callable[..., Any] | str = ""
    """``prepare(preparing, settings)`` returns tensors that all edits of the method need, as {name: tensor}. It runs
    once. The tensors are saved in the run folder and passed on as ``shared.prepared[method]``. `preparing` is a
    `locaudit.run.prepare.Preparing`. Empty for a method that needs no such tensors."""
    grid: str | tuple[str, ...] = ""
    """Name of the settings field with the strengths to try. One of them is chosen on validation questions. If there are
    several names, the first field that is not None counts. Empty for a method without a strength, which makes a single
    edit per location."""
    symbol: str | Callable[[Any], str] = ""
    """Symbol of the strength, for example ``α``, or a function from the settings to the symbol."""
    supports: Literal["higher", "lower"] = "higher"
    """Whether a higher or a lower score at the claim supports the claim."""
    null: Literal["places", "directions"] = "places"
    """What controls are: random places of the claim's kind and size, or random directions at the claim (`Job.draw`)."""
    whole: bool = True
    """Whether the whole model is edited too, as an upper reference for the effect size."""
    rest: bool = False
    """Whether everything but the claim is edited too, to test whether the claim is necessary."""
    placebo: bool | Callable[[Any], bool] = False
    """Whether placebos are fitted, too, or a function of the settings that says so: with ``shared.training`` and what
    `prepare` computes from training questions half of which have their true and false answers exchanged
    (`locaudit.run.placebos`). For methods whose edits depend on which answers are true."""
    trained: bool = False
    """Whether edits are trained; several can then be trained together in one bank."""
    check: Callable[[Any], object] = str
    """``check(settings)`` raises `LocauditError`, for example for a missing file, before anything is loaded. The
    default checks nothing."""

    def __post_init__(self):
        names = [entry.name for entry in fields(self.settings)]
        if not set(self.grids) <= set(names):
            raise ConfigError(
                got=f"grid = {self.grid!r} in the method {self.title!r}",
                expected=f"the setting to search over, a field of {self.settings.__name__}: {', '.join(names)}",
                remedy="set grid to one of them",
            )

    def strengths(self, settings: Any) -> tuple[float | None, ...]:
        """The strengths to try under these settings; ``(None,)`` for a method without strengths."""
        grid = self.grid_of(settings)
        return tuple(getattr(settings, grid)) if grid else (None,)

    @property
    def grids(self) -> tuple[str, ...]:
        """The names in `grid`."""
        return (self.grid,) * bool(self.grid) if isinstance(self.grid, str) else self.grid

    def grid_of(self, settings: Any) -> str:
        """The name in `grid` that counts under these settings; empty for a method without strengths."""
        return next((name for name in self.grids if getattr(settings, name) is not None), "")

    def symbol_of(self, settings: Any) -> str:
        """The symbol of the strength under these settings."""
        return self.symbol(settings) if callable(self.symbol) else self.symbol

    def has_placebo(self, settings: Any) -> bool:
        """Whether placebos are fitted under these settings."""
        return self.placebo(settings) if callable(self.placebo) else self.placebo

    @property
    def fitter(self) -> Callable[..., Sequence[Any]]:
        """The function that `fit` names, imported if necessary."""
        return _function(self.fit)

    @property
    def preparer(self) -> Callable[..., Any] | None:
        """The function that `prepare` names, imported if necessary; None if there is none."""
        return _function(self.prepare) if self.prepare else None


def _function(named: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Objective:
    """A training loss over pairs of a true and a false answer."""

    loss: Callable[[Any, float], Any]
    """``loss(margin, strength)`` turns margins h = r(y+) - r(y-) (pairs,) into losses (pairs,). r is an answer's
    log-ratio to the unedited model, and y+ and y- are a true and a false answer. The strength is a number."""
    symbol: str
    """Symbol of the strength, for example ``τ``."""


@dataclass(frozen=True)
class Rule:
    """A way of ranking places (``locaudit find``). ``RULES.register(name)(Rule(...))`` adds one."""

    means: str
    """What a score is, for example ``validation accuracy of a linear probe``."""
    rank: Callable[..., Any] | str
    """``rank(preparing)`` returns a tensor (layers, units) of scores, high where the place is good. `preparing` is a
    `locaudit.run.prepare.Preparing`, with the model and training questions only. Or its name ``"module:function"``."""
    is_change: bool = False
    """Whether the tensor has changes of either sign, which are ranked by their size."""
    replaces: bool = False
    """Whether the rule replaces outputs of units, at the tokens of ``preparing.positions``, by ``preparing.pairs`` if
    there are any."""

    @property
    def ranker(self) -> Callable[..., Any]:
        """The function that `rank` names, imported if necessary."""
        return _function(self.rank)
