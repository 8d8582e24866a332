"""Dataclasses whose values pydantic checks against their annotations.

A wrong value raises `ConfigError`, which gives the dotted name of the setting, the expected value, and where the wrong
one came from. Types are strict: strings and bools are not converted to numbers. Lists become tuples, and integers
become floats if the field is a float. NaN and infinity are refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from locaudit.errors import ConfigError, LocauditError

C = TypeVar("C")
"""A settings class."""
HERE = "the configuration"
"""Where a value came from, if nothing more exact is known."""
_MOST_LISTED = 8
"""Most names of settings that an error lists."""
_RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuse a value that occurs twice."""
    if len(set(values)) < len(values):
        raise ValueError("each value once; delete the repeated ones")
    return values


Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Grid = Annotated[tuple[float, ...], Field(strict=False, min_length=1), AfterValidator(each_once)]
"""One or more different values to try."""
PositiveGrid = Annotated[tuple[Positive, ...], Field(strict=False, min_length=1), AfterValidator(each_once)]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(cls: type[C]) -> type[C]:
    """Decorator for a frozen dataclass that raises `ConfigError` for a value that does not fit its annotation."""
    made = pydantic.dataclasses.dataclass(frozen=True, config=_RULES)(cls)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, *args: Any, **values: Any) -> None:
        with _reported(made, "", HERE):
            check(self, *args, **values)

    made.__init__ = init
    return made  # type: ignore[return-value]


def validate(cls: type[C], values: Any, *, prefix: str = "", source: str = "") -> C:
    """Make an instance of the dataclass `cls` from nested values, such as those of a YAML file.

    Raises `ConfigError` for a wrong value. Its message puts `prefix` (such as ``split.``) before the name of the
    setting and says that the value came from `source`; if `source` is empty, the caller adds that.
    """
    with _reported(cls, prefix, source):
        # In JSON mode, pydantic's strict types accept a list for a tuple and a mapping for a dataclass, as we want.
        return _adapter(cls).validate_json(json.dumps(values, default=plain))


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as a nested dict, with lists for tuples, as a YAML file holds them."""
    return json.loads(json.dumps(config, default=plain))


def wrong(name: str, value: Any, expected: str, remedy: str) -> ConfigError:
    """The error for a wrong value of a setting."""
    return ConfigError(got=f"{name} = {value!r}", expected=expected, remedy=remedy)


def unknown(name: str, known: Iterable[str], value: Any = None) -> ConfigError:
    """The error for an unknown setting, which names what replaces it, or suggests a similar name."""
    if new := renamed(name, value):
        return ConfigError(got=f"the unknown setting {name}", expected=f"{new}, which replaces it", remedy="rename it")
    *groups, key = name.split(".")
    near, names = difflib.get_close_matches(key, known, n=1), list(known)
    hint = f"did you mean {'.'.join([*groups, *near])}?" if near else "check the spelling."
    few = f"one of {', '.join(names) or 'none'}"
    return ConfigError(
        got=f"the unknown setting {name}",
        expected=few if len(names) <= _MOST_LISTED else "a known one",
        remedy=f"{hint} For all names, see the command's --help-all",
    )


def renamed(name: str, value: Any) -> str:
    """Present name of a setting, or of its value, that an earlier version called otherwise; empty if there is none."""
    if name == "match":
        return f"nulls: [{null_of(value)}]"
    reader = value.get("reader") if name == "optimal" and isinstance(value, Mapping) else value
    if (name, value) == ("prompt.primer", "default"):
        return "auto (the behaviour's own) or truthful (the bundled one, before any questions)"
    if reader == "none" and name in ("optimal", "optimal.reader", "methods.optimal.reader"):
        return "the method constant"
    old = next((old for old in _RENAMED if f"{name}.".startswith(f"{old}.")), "")
    return old and _RENAMED[old] + name.removeprefix(old)


def null_of(match: Any) -> str:
    """The null that a value of the earlier setting ``match`` stands for; ``anywhere`` for an unknown value."""
    names = {"layer": "layers", "kv-group": "kv-groups", "probe-accuracy": "probe-accuracy", "norm": "norm"}
    return names.get(match, "anywhere")


_RENAMED = {
    "match": "nulls",
    "iti": "methods.iti",
    "optimal": "methods.optimal",
    "judges.target": "judges.truth",
    "judges.retention": "judges.info",
}


@functools.cache
def _adapter(cls: type) -> TypeAdapter:
    # The settings of a plug-in can be a plain dataclass.
    return TypeAdapter(cls if is_pydantic_dataclass(cls) else pydantic.with_config(_RULES)(cls))


@functools.singledispatch
def plain(value: Any) -> Any:
    """Settings (a dataclass) as a mapping."""
    if not dataclasses.is_dataclass(value):
        raise ConfigError(got=repr(value), expected="text, a number, a list or a mapping", remedy="put it in quotes")
    return vars(value)


@plain.register
def _(value: datetime.date) -> str:  # YAML reads 2026-01-31 as a date
    return value.isoformat()


@contextmanager
def _reported(cls: type, prefix: str, source: str) -> Iterator[None]:
    """Turn pydantic's errors into `ConfigError`, and add to every error where the value came from."""
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
    if place and isinstance(place[0], int):  # a positional argument
        place = (fields[place[0]], *place[1:])
    names = [part for part in place if isinstance(part, str)]
    hint: Any = cls
    for part in names:
        fields = list(get_type_hints(hint))
        hint = get_type_hints(hint).get(part)
    name = (prefix + ".".join(names)).rstrip(".")
    if kind == "unexpected_keyword_argument":
        return unknown(name, fields, value)
    if kind == "missing" and len(names) == len(place):
        return ConfigError(got=f"no value for {name}", expected="a value", remedy="set it")
    if kind.startswith("dataclass"):
        keys = ", ".join(get_type_hints(hint))
        return wrong(name, value, f"keys among {keys or 'none'}", "indent its settings under it")
    if new := renamed(name, value):
        return wrong(name, value, f"{new}, which replaces it", "change it")
    if cause is not None:
        expected, _, remedy = str(cause).partition("; ")
        return wrong(name, value, expected, remedy)
    is_list, is_inside = get_origin(hint) is tuple, len(names) < len(place)
    if is_list and kind == "too_short":
        return wrong(name, value, f"at least 1 value in {_described(hint)}", _as_list(name, value, hint))
    if is_list and kind.endswith("_type") and not is_inside:
        return wrong(name, value, _described(hint), _as_list(name, value, hint))
    if kind.endswith("_type") or kind == "missing":
        inside = is_list and is_inside and kind != "missing"
        expected = _described(get_args(hint)[0] if inside else hint)
    else:
        expected = first["msg"].removeprefix("Input should be ").replace("greater than or equal to", "at least")
    remedy = "change the value; the command's --help-all describes it"
    return wrong(name, value, expected, "put it in quotes" if hint == str | None else remedy)


def _as_list(name: str, value: Any, hint: Any) -> str:
    """How to write the value of a setting that takes a list of any length; `value` itself if it may be in the list."""
    inside, size = get_args(hint)[:2]
    choices = get_args(inside) if get_origin(inside) is Literal else ()
    fits = value in choices if choices else isinstance(value, (float, int) if inside is float else inside)
    example = value if fits else choices[0] if choices else "..."
    return f"write {name.split('.')[-1]}: [{example}{'' if size is Ellipsis else ', ...'}]"


def _described(hint: Any) -> str:
    """A type in words: ``a list (each value: 'seed', 'primer' or 'wording')``."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        *most, last = map(repr, parts)
        return f"{', '.join(most)} or {last}" if most else last
    if get_origin(hint) is tuple:
        number = "" if parts[-1] is Ellipsis else f"of {len(parts)} values "
        return f"a list {number}(each value: {_described(parts[0])})"
    if get_origin(hint) in (UnionType, Union):
        return " or ".join(map(_described, parts))
    if get_origin(hint) is Mapping:
        return "a mapping (KEY: VALUE)"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "nothing"}
    return words.get(hint, str(hint).replace("typing.", ""))
