"""What can be added to locaudit from one file: one small registry for each kind of thing.

    from locaudit.registry import SCORES

    @SCORES.register("shortness")
    class Shortness: ...

A thing is found under its name. Built-in modules are imported when a registry is first asked; another package adds its
own by an entry point of the group ``locaudit.<registry>``, a user by ``plugins: [module or file.py]`` in the settings
(`load_plugins`), which driver, workers and reports import alike.
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
    """Name -> thing, in the order of registration. An unknown name raises `ConfigError` with the near ones."""

    def __init__(self, group: str, what: str, *modules: str):
        self.group, self.what = group, what
        self._modules = modules
        self._things: dict[str, Any] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that adds a class, function or value under `name`; a name that is taken raises `ConfigError`."""

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
        """Add a thing for a while, in place of one of that name if there is one; for tests."""
        self._fill()
        before = dict(self._things)
        self._things[name] = thing
        try:
            yield
        finally:
            self._things = before

    def __getitem__(self, name: str) -> Any:
        self._fill()
        try:
            return self._things[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._things, n=1)
            raise ConfigError(
                got=f"the {self.what} {name!r}",
                expected=f"one of {', '.join(self._things)}",
                remedy=f"did you mean {near[0]!r}?" if near else "check the spelling, or name its file in plugins",
            ) from None

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(tuple(self._things))

    def __len__(self) -> int:
        self._fill()
        return len(self._things)

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True
        for module in self._modules:
            importlib.import_module(module)
        for entry in metadata.entry_points(group=f"locaudit.{self.group}"):
            self._things.setdefault(entry.name, entry.load())


METHODS = Registry("methods", "method", "locaudit.methods")
"""Ways of finding an edit: `locaudit.methods.Method`."""
KINDS = Registry("kinds", "kind of place", "locaudit.claims.kinds")
"""Ways of cutting a model into places: `locaudit.claims.kinds.Kind`."""
OBJECTIVES = Registry("objectives", "objective", "locaudit.methods")
"""Losses over answer pairs that optimal edits are trained with: `locaudit.methods.Objective`."""
SCORES = Registry("scores", "score", "locaudit.stats.scores")
"""What a verdict compares: `locaudit.stats.scores.Score`."""
JUDGES = Registry("judges", "kind of judge", "locaudit.judges")
"""Who judges answers: `locaudit.judges.JudgeKind`."""
ASPECTS = Registry("aspects", "judged aspect", "locaudit.judges")
"""What is asked of an answer: `locaudit.judges.Aspect`."""
IMPORTERS = Registry("importers", "claim format", "locaudit.claims.importers")
"""Readers of claim files, by format."""
LOADERS = Registry("loaders", "behaviour format", "locaudit.behaviours.loaders")
"""Readers of behaviours, by format."""
EXECUTORS = Registry("executors", "executor", "locaudit.run.executors")
"""Where trials run: `locaudit.run.executors.Executor`."""
ARCHITECTURES = Registry("architectures", "architecture", "locaudit.models.architectures")
"""transformers' ``config.model_type`` -> `locaudit.models.Architecture`."""


def load_plugins(plugins: Sequence[str]) -> None:
    """Import modules by name, or files by path, that add to the registries; a second time does nothing.

    Raises `ConfigError` for one that cannot be imported, whatever it raises.
    """
    for plugin in plugins:
        try:
            _import_file(Path(plugin)) if plugin.endswith(".py") else importlib.import_module(plugin)
        except ConfigError:
            raise
        except Exception as error:  # a plug-in may raise anything
            raise ConfigError(
                got=f"the plug-in {plugin}, which cannot be imported ({type(error).__name__}: {error})",
                expected="a module's name, or the path of a Python file",
                remedy="check plugins, and that the file imports by itself",
            ) from error


def _import_file(path: Path) -> None:
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"locaudit_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(got=f"{path}, which is not a file", expected="a Python file", remedy="check plugins")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
