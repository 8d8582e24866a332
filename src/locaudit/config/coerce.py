"""Values from YAML, flags or Python into the types that the settings declare, and the checks on them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from locaudit.errors import ConfigError


def merge(instance: Any, values: Any, source: str, prefix: str) -> Any:
    """`instance` with the fields that `values` names changed; nested settings take a mapping. Raises `ConfigError`."""
    fields = {f.name: f for f in dataclasses.fields(instance)}
    if isinstance(values, type(instance)):
        values = vars(values)
    if not isinstance(values, Mapping):
        raise ConfigError(
            got=f"{prefix or 'a document'} = {values!r} in {source}",
            expected=f"keys among {', '.join(fields)}",
            remedy="indent the settings under it",
        )
    unknown = [str(key) for key in values if key not in fields]
    if unknown:
        raise ConfigError(
            got=f"the unknown setting {prefix}{unknown[0]} in {source}",
            expected=f"one of {', '.join(fields)}",
            remedy="check the spelling; the command's --help lists all",
        )
    hints = hints_of(type(instance))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        current = getattr(instance, key)
        if dataclasses.is_dataclass(current):
            changes[key] = merge(current, value, source, f"{prefix}{key}.")
        else:
            changes[key] = coerce(value, hints[key], f"{prefix}{key}", source)
    return dataclasses.replace(instance, **changes)


def hints_of(cls: type) -> dict[str, Any]:
    """Field -> type of a settings class."""
    return get_type_hints(cls)


def coerce(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value as `hint` wants it (lists to tuples, ints to floats), or `ConfigError`. No other conversions."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for option in options:
            try:
                return coerce(value, option, name, source)
            except ConfigError:
                continue
    elif origin is tuple:
        values = value if isinstance(value, list | tuple) else ()
        inner = options[:1] * len(values) if options[-1:] == (Ellipsis,) else options
        if isinstance(value, list | tuple) and len(inner) == len(value):
            return tuple(coerce(item, hint_, name, source) for item, hint_ in zip(value, inner, strict=True))
    elif origin is Literal:
        if value in options:
            return value
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, str) and _SCIENTIFIC.match(value):
            value = float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(
        got=f"{name} = {value!r} in {source}",
        expected=_describe(hint),
        remedy="put it in quotes" if hint == str | None else "mend the value; the command's --help describes it",
    )


_SCIENTIFIC = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
"""1e-3 is a number to everyone but YAML 1.1, which wants 1.0e-3."""


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def check_grid(name: str, grid: tuple[float, ...]) -> None:
    """Raise `ConfigError` for a grid that is empty or repeats a value."""
    check(len(grid) > 0, f"{name} empty", "at least one value", "name a value")
    check(len(set(grid)) == len(grid), f"{name} = {grid}", "each value once", "drop the repeats")


def check(ok: bool, got: str, expected: str, remedy: str) -> None:
    """Raise `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(got=got, expected=expected, remedy=remedy)
