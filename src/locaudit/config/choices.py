"""The settings ``methods`` (which methods run) and ``judges`` (which judge assesses each aspect of the answers).

Both are immutable, hashable mappings from names to settings. The registry knows the class of settings of each method
and each kind of judge.
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
    """Inside this context, names of unregistered methods and judges and values of earlier versions are accepted.

    They are kept as they are. This is for reading a run whose plug-in is missing or that an earlier version wrote.
    """
    token = LENIENT.set(True)
    try:
        yield
    finally:
        LENIENT.reset(token)


class Frozen(dict[str, Any]):
    """An immutable dict with hashable values. The order of its keys does not affect equality or hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self):
        return type(self), (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("settings cannot be changed; make new ones with dataclasses.replace or merge_config")

    __setitem__ = __delitem__ = pop = popitem = clear = __ior__ = _refuse
    update = setdefault = _refuse  # type: ignore[assignment]


@dataclass(frozen=True)
class JudgeChoice:
    """The judge of an aspect: a kind of judge, and the settings of that kind."""

    kind: str = "default"
    """A registered kind of judge, or ``default``: the aspect's bundled judge if the behaviour has the
    aspect and ``evaluation.max_new_tokens`` is not 0, otherwise none."""
    settings: Any = None
    """An instance of ``JUDGES[kind].settings``; None for ``default``."""


def choose_methods(value: Any = ("iti", "optimal")) -> Frozen:
    """Check the setting ``methods``: a list of names, or a mapping from names to the settings of each method."""
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) < len(value):
            raise wrong("methods", value, "each method once", "delete the repeated names")
        value = dict.fromkeys(map(str, value))
    if not isinstance(value, Mapping) or not value:
        names = f"names of methods ({', '.join(METHODS)}), with or without settings"
        raise wrong("methods", value, names, "write, for example, methods: [iti, optimal]")
    return Frozen({name: _settings(METHODS, name, item, "methods", f"methods.{name}") for name, item in value.items()})


def choose_judges(value: Mapping[str, Any] = MappingProxyType({})) -> Frozen:
    """Check the setting ``judges``, and add the default judge for every registered aspect that it leaves out."""
    for aspect in value:
        if aspect not in ASPECTS and not LENIENT.get():
            raise unknown(f"judges.{aspect}", list(ASPECTS))
    return Frozen({name: choose_judge(value.get(name, {}), f"judges.{name}") for name in dict(ASPECTS) | dict(value)})


def choose_judge(value: Any, name: str) -> JudgeChoice:
    """The judge described by a mapping: the key ``kind``, and beside it the settings of that kind."""
    value = plain(value) if isinstance(value, JudgeChoice) else value
    if not isinstance(value, Mapping):
        raise wrong(
            name,
            value,
            "a mapping with the key kind",
            f"write, for example, {name.split('.')[-1]}: {{kind: reference}}",
        )
    own = {key: item for key, item in value.items() if key != "kind"}
    kind = value.get("kind", "default")
    if kind != "default":
        return JudgeChoice(kind, _settings(JUDGES, kind, own, f"{name}.kind", name))
    for key in own:
        kinds = f"{name}.kind, one of {', '.join(JUDGES)}"
        raise ConfigError(got=f"{name}.{key} without a kind of judge", expected=kinds, remedy=f"set {name}.kind, too")
    return JudgeChoice()


@plain.register
def _(judge: JudgeChoice) -> dict[str, Any]:
    return {"kind": judge.kind, **(to_dict(judge.settings) or {})}


MethodsField = Annotated[Mapping[str, Any], PlainValidator(choose_methods)]
"""Type of the field ``methods`` in a settings class."""
JudgesField = Annotated[Mapping[str, Any], AfterValidator(choose_judges)]
"""Type of the field ``judges`` in a settings class."""


def find(registry: Registry, key: Any, name: str) -> Any:
    """The part registered under `key`, the value of the setting `name`.

    Raises `ConfigError`, which suggests similar names, if there is none. Inside `unknown_names_kept`, it returns None.
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
