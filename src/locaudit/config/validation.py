"""Dataclasses whose values are checked against their annotations, by pydantic.

A wrong value raises `ConfigError`, which names the setting by its dotted name, what was expected and where it came
from. Types are strict: no string or bool becomes a number. Lists become tuples, ints become floats where a field is
one, and NaN and infinity are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from locaudit.errors import ConfigError, LocauditError

C = TypeVar("C")
"""A settings class."""
HERE = "the configuration"
"""Where a value came from, when nothing better is known."""
_RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each value once; drop the repeats")
    return values


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Grid = Annotated[tuple[float, ...], Field(strict=False, min_length=1), AfterValidator(_each_once)]
"""Different values to try, at least one."""
PositiveGrid = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1), AfterValidator(_each_once)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(cls: type[C]) -> type[C]:
    """Make a class a frozen dataclass that raises `ConfigError` for a value that its annotations refuse."""
    made = pydantic.dataclasses.dataclass(frozen=True, config=_RULES)(cls)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, *args: Any, **values: Any) -> None:
        with _reported(made, "", HERE):
            check(self, *args, **values)

    made.__init__ = init
    return made  # type: ignore[return-value]


def validate(cls: type[C], values: Any, *, prefix: str = "", source: str = "") -> C:
    """A `cls`, any dataclass, of nested values as a YAML file has them. Raises `ConfigError`.

    `prefix` stands before the names of its settings in errors: ``split.``. Without a `source` the caller adds it.
    """
    with _reported(cls, prefix, source):
        # As JSON, where pydantic's strict types are just ours: a list is a tuple, a mapping a dataclass.
        return _adapter(cls).validate_json(json.dumps(values, default=plain))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict, tuples as lists: what the YAML file holds."""
    return json.loads(json.dumps(config, default=plain))


def wrong(name: str, value: Any, expected: str, remedy: str) -> ConfigError:
    """The error for a setting with a value that it cannot have."""
    return ConfigError(got=f"{name} = {value!r}", expected=expected, remedy=remedy)


def unknown(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a setting that does not exist, with a near name."""
    *groups, key = name.split(".")
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {'.'.join([*groups, *near])}?" if near else "check the spelling"
    expected = f"one of {', '.join(known) or 'none'}"
    return ConfigError(
        got=f"the unknown setting {name}", expected=expected, remedy=f"{hint}; the command's --help lists all"
    )


def refuse_old(values: Mapping[str, Any], known: Iterable[str], source: str) -> None:
    """Raise one `ConfigError` for all settings of version 0.1.0 among nested values; `known` are the present ones."""
    found: dict[str, str] = {}
    for old in _RENAMED:
        group, _, key = old.partition(".")
        value = values.get(group)
        if key:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and (key or group not in known):
            found[old] = renamed(old, value)
    if found:
        raise ConfigError(
            got=f"the setting{'s' * (len(found) > 1)} {', '.join(found)} in {source}",
            expected=", ".join(found.values()),
            remedy="rename what locaudit 0.1.0 called so, and keep of a judge only its kind and what that kind has "
            "(docs/judges.md); a folder that 0.1.0 made cannot go on: choose another --out",
        )


def renamed(name: str, value: Any) -> str:
    """What a setting of an earlier version, or its value, is called now; empty for any other."""
    reader = value.get("reader") if name == "optimal" and isinstance(value, Mapping) else value
    if (name, value) == ("prompt.primer", "default"):
        return "auto (the behaviour's own) or truthful (the bundled one, before any questions)"
    if reader == "none" and name in ("optimal", "optimal.reader", "methods.optimal.reader"):
        return "the method constant"
    old = next((old for old in _RENAMED if f"{name}.".startswith(f"{old}.")), "")
    return old and _RENAMED[old] + name.removeprefix(old)


_RENAMED = {
    "iti": "methods.iti",
    "optimal": "methods.optimal",
    "judges.target": "judges.truth",
    "judges.retention": "judges.info",
}


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    # A plug-in's settings may be a plain dataclass.
    return TypeAdapter(cls if is_pydantic_dataclass(cls) else pydantic.with_config(_RULES)(cls))


@functools.singledispatch
def plain(value: Any) -> Any:
    """Settings as a mapping."""
    if not dataclasses.is_dataclass(value):
        raise ConfigError(got=repr(value), expected="text, a number, a list or a mapping", remedy="put it in quotes")
    return vars(value)


@contextmanager
def _reported(cls: type, prefix: str, source: str) -> Iterator[None]:
    """Turn pydantic's error about a `cls` into a `ConfigError`, and say of any where the value came from."""
    try:
        yield
    except (ValidationError, LocauditError) as error:
        found = error if isinstance(error, LocauditError) else _translated(error, cls, prefix)
        got = found.got.removesuffix(f" in {HERE}") + (f" in {source}" if source else "")
        raise type(found)(got=got, expected=found.expected, remedy=found.remedy) from None


def _translated(error: ValidationError, cls: type, prefix: str) -> LocauditError:
    first = error.errors(include_url=False)[0]
    kind, value, place, cause = first["type"], first["input"], first["loc"], first.get("ctx", {}).get("error")
    if isinstance(cause, LocauditError):
        return cause
    fields = [field.name for field in dataclasses.fields(cls)]
    if place and isinstance(place[0], int):  # an argument without a name
        place = (fields[place[0]], *place[1:])
    names = [part for part in place if isinstance(part, str)]
    hint: Any = cls
    for part in names:
        fields = list(get_type_hints(hint))
        hint = get_type_hints(hint).get(part)
    name = (prefix + ".".join(names)).rstrip(".")
    if kind == "unexpected_keyword_argument":
        return unknown(name, fields)
    if kind == "missing" and len(names) == len(place):
        return ConfigError(got=f"no {name}", expected="a value", remedy="set it")
    if kind.startswith("dataclass"):
        keys = ", ".join(get_type_hints(hint))
        return wrong(name, value, f"keys among {keys or 'none'}", "indent the settings under it")
    if new := renamed(name, value):
        return wrong(name, value, f"{new}, as it is called now", "choose that")
    if cause is not None:
        expected, _, remedy = str(cause).partition("; ")
        return wrong(name, value, expected, remedy)
    if kind.endswith("_type") or kind == "missing":
        expected = _described(hint) if len(names) == len(place) or kind == "missing" else kind.removesuffix("_type")
    else:
        expected = first["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    remedy = "mend the value; the command's --help describes it"
    return wrong(name, value, expected, "put it in quotes" if hint == str | None else remedy)


def _described(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
