"""Registries: methods, kinds of places, scores, judges and other parts, each found under its name.

    from locaudit.registry import SCORES

    @SCORES.register("shortness")
    class Shortness: ...

Everything registered can be used by name in the settings; no other code has to name it. Parts come from three places:

- built-in modules, which register their parts when a registry is first read;
- other packages, which name their parts in an entry point of the group ``locaudit.<registry>``;
- modules or files that the user lists in the settings (``plugins: [mine.py]``). They are imported wherever a run or a
  report needs them (`load_plugins`).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from locaudit.errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """A mapping from names to registered parts, in order of registration.

    An unknown name raises `ConfigError`, which lists the known names and suggests the most similar one.
    """

    def __init__(self, group: str, what: str, *modules: str):
        self.group, self.what = group, what
        self._modules = modules
        self._things: dict[str, Any] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class, function or value under `name`.

        Raises `ConfigError` if the name already belongs to another thing.
        """

        def add(thing: T) -> T:
            if self._things.get(name, thing) is not thing:
                raise ConfigError(
                    got=f"a second {self.what} called {name!r}", expected="a new name", remedy="choose another"
                )
            self._things[name] = thing
            return thing

        return add

    @contextmanager
    def temporary(self, name: str, thing: Any) -> Iterator[None]:
        """Register `thing` within a ``with`` block, replacing one of the same name; meant for tests."""
        before = dict(self._all)
        self._things[name] = thing
        try:
            yield
        finally:
            self._things = before

    def __getitem__(self, name: str) -> Any:
        try:
            return self._all[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._things, n=1)
            raise ConfigError(
                got=f"the {self.what} {name!r}",
                expected=f"one of {', '.join(self._things)}",
                remedy=f"did you mean {near[0]!r}?" if near else "check the spelling, or list its file in plugins",
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._all))

    def __len__(self) -> int:
        return len(self._all)

    @property
    def _all(self) -> dict[str, Any]:
        """All registered parts. The first call imports built-in modules and entry points."""
        if not self._filled:
            self._filled = True
            for module in self._modules:
                importlib.import_module(module)
            for entry in metadata.entry_points(group=f"locaudit.{self.group}"):
                self._things.setdefault(entry.name, entry.load())
        return self._things


METHODS = Registry("methods", "method", "locaudit.methods")
"""Ways of finding an edit: `locaudit.methods.Method`."""
KINDS = Registry("kinds", "kind of place", "locaudit.claims.kinds", "locaudit.claims.directions")
"""Kinds of places: `locaudit.claims.kinds.Kind`."""
RULES = Registry("rules", "rule", "locaudit.methods")
"""Rules that rank places: `locaudit.methods.Rule`."""
OBJECTIVES = Registry("objectives", "objective", "locaudit.methods")
"""Training losses over answer pairs: `locaudit.methods.Objective`."""
SCORES = Registry("scores", "score", "locaudit.stats.scores")
"""Scores that a verdict can compare: `locaudit.stats.scores.Score`."""
JUDGES = Registry("judges", "kind of judge", "locaudit.judges")
"""Kinds of judges of generated answers: `locaudit.judges.JudgeKind`."""
ASPECTS = Registry("aspects", "judged aspect", "locaudit.judges")
"""What judges rate in an answer, such as its truth: `locaudit.judges.Aspect`."""
IMPORTERS = Registry("importers", "claim format", "locaudit.claims.importers")
"""Readers of claim files, by file suffix."""
LOADERS = Registry("loaders", "behaviour format", "locaudit.behaviours.loaders")
"""Readers of behaviours (questions with answers), by name of the format."""
EXECUTORS = Registry("executors", "executor", "locaudit.run.executors", "locaudit.run.executors.ray")
"""Ways of running trials: `locaudit.run.executors.Executor`."""
TRACKERS = Registry("trackers", "tracker", "locaudit.run.trackers")
"""Programs that show a run while it runs: `locaudit.run.trackers.Tracker`."""
ARCHITECTURES = Registry("architectures", "architecture", "locaudit.architectures")
"""Supported architectures, by transformers' ``config.model_type``: `locaudit.architectures.Architecture`."""


def load_plugins(plugins: Sequence[str]) -> None:
    """Import plug-ins, given as module names or paths of Python files; importing one again does nothing.

    Raises `ConfigError` if a plug-in cannot be imported or raises any error when it is imported.
    """
    for plugin in plugins:
        try:
            _import_file(Path(plugin)) if plugin.endswith(".py") else importlib.import_module(plugin)
        except ConfigError:
            raise
        except Exception as error:  # a plug-in may raise anything
            raise ConfigError(
                got=f"the plug-in {plugin}, which cannot be imported ({type(error).__name__}: {error})",
                expected="the name of a module, or the path of a Python file",
                remedy="check the setting plugins, and that Python can import the file by itself",
            ) from error


def _import_file(path: Path) -> None:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"locaudit_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(got=f"{path}, which is not a file", expected="a Python file", remedy="check its path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
