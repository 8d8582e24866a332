"""Settings that belong to a registered thing: which methods are run, and who judges each aspect.

Both are mappings, name -> settings, whose classes the registry holds. They do not change and can be hashed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator

from locaudit.config.validation import plain, to_dict, unknown, validate, wrong
from locaudit.errors import ConfigError
from locaudit.registry import ASPECTS, JUDGES, METHODS, Registry

LENIENT: ContextVar[bool] = ContextVar("lenient", default=False)
"""Whether the caller is inside `unknown_names_kept`."""


@contextmanager
def unknown_names_kept() -> Iterator[None]:
    """Inside, settings of a method or judge that is not registered, and former values, stay as they were read.

    For reading a run whose plug-in is not there, or of an earlier version.
    """
    token = LENIENT.set(True)
    try:
        yield
    finally:
        LENIENT.reset(token)


class Frozen(dict[str, Any]):
    """A dict that does not change; its values can be hashed. The order of its keys does not matter to equality."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self):
        return type(self), (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("settings do not change; make others with dataclasses.replace or merge_config")

    __setitem__ = __delitem__ = pop = popitem = clear = __ior__ = _refuse
    update = setdefault = _refuse  # type: ignore[assignment]


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges an aspect: a kind of judge, and that kind's own settings."""

    kind: str = "default"
    """A registered kind; ``default``: the bundled judge where the behaviour has the aspect, unless
    ``evaluation.max_new_tokens`` is 0; else none."""
    settings: Any = None
    """Of the class ``JUDGES[kind].settings``; None for ``default``."""


def choose_methods(value: Any = ("iti", "optimal")) -> Frozen:
    """The methods of a list, or of a mapping with settings of each; those of the paper without one."""
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) < len(value):
            raise wrong("methods", value, "each once", "drop the repeats")
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, Mapping) or not value:
        names = f"names of methods, or names with settings: {', '.join(METHODS)}"
        raise wrong("methods", value, names, "write methods: [iti, optimal]")
    return Frozen({name: _settings(METHODS, name, item, "methods", f"methods.{name}") for name, item in value.items()})


def choose_judges(value: Mapping[str, Any] = MappingProxyType({})) -> Frozen:
    """The judge of every registered aspect; the default one where the mapping does not have it."""
    for aspect in value:
        if aspect not in ASPECTS and not LENIENT.get():
            raise unknown(f"judges.{aspect}", list(ASPECTS))
    return Frozen({name: choose_judge(value.get(name, {}), f"judges.{name}") for name in dict(ASPECTS) | dict(value)})


def choose_judge(value: Any, name: str) -> JudgeChoice:
    """The judge of a mapping: its ``kind``, and that kind's settings beside it."""
    value = plain(value) if isinstance(value, JudgeChoice) else value
    if not isinstance(value, Mapping):
        raise wrong(name, value, "kind, and settings of that kind", "indent them under it")
    own = {key: item for key, item in value.items() if key != "kind"}
    kind = value.get("kind", "default")
    if kind != "default":
        return JudgeChoice(kind, _settings(JUDGES, kind, own, f"{name}.kind", name))
    for key in own:
        kinds = f"{name}.kind, one of {', '.join(JUDGES)}"
        raise ConfigError(got=f"{name}.{key} without a kind of judge", expected=kinds, remedy="name its kind, too")
    return JudgeChoice()


@plain.register
def _(judge: JudgeChoice) -> dict[str, Any]:
    return {"kind": judge.kind, **(to_dict(judge.settings) or {})}


MethodsField = Annotated[Mapping[str, Any], PlainValidator(choose_methods)]
"""Type of a field of chosen methods."""
JudgesField = Annotated[Mapping[str, Any], AfterValidator(choose_judges)]
"""Type of a field of chosen judges."""


def find(registry: Registry, key: Any, name: str) -> Any:
    """The thing that the setting `name` names, or None for an unknown one that is kept (`unknown_names_kept`).

    Raises `ConfigError` with the near names.
    """
    if LENIENT.get() and key not in registry:
        return None
    try:
        return registry[str(key)]
    except ConfigError as error:
        raise wrong(name, key, error.expected, error.remedy) from None


def _settings(registry: Registry, key: Any, values: Any, name: str, prefix: str) -> Any:
    thing, values = find(registry, key, name), {} if values is None else values
    return validate(thing.settings, values, prefix=f"{prefix}.") if thing else Frozen(values)
