"""Read settings from YAML, and write them to YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from locaudit.config.settings import AuditConfig
from locaudit.config.validation import plain, to_dict, validate
from locaudit.errors import ConfigError, LocauditError

C = TypeVar("C")
"""A settings class."""


class _Loader(yaml.SafeLoader):
    """Refuses a mapping in which a key occurs twice. YAML would use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):  # 1e-3 is a number; YAML 1.1 accepts only 1.0e-3
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def to_yaml(config: Any) -> str:
    """All settings as YAML, including those that have their default value."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, base: AuditConfig | None = None) -> AuditConfig:
    """The settings `base` (None: the defaults), overridden by the settings in a YAML file.

    Raises `ConfigError` for a missing file, an unknown setting or a wrong value.
    """
    return read_over(base or AuditConfig(), path)


def load_preset(name: str) -> AuditConfig:
    """The settings of a preset that comes with the package: ``demo`` or ``positive``."""
    return parse_over(AuditConfig(), preset_text(name), f"preset {name}")


def parse_config(text: str, base: AuditConfig | None = None, *, source: str = "the text") -> AuditConfig:
    """Like `load_config`, for YAML text. Errors call the text `source`."""
    return parse_over(base or AuditConfig(), text, source)


def read_over(base: C, path: str | Path) -> C:
    """Settings `base` of any class, overridden by those in a YAML file. Raises `ConfigError` like `load_config`."""
    return parse_over(base, read_bytes(path).decode(), str(path))


def parse_over(base: C, text: str, source: str) -> C:
    """Like `read_over`, for YAML text. Errors call the text `source`."""
    return merge_config(base, parse_values(text, source), source=source)


def merge_config(base: C, values: Any, *, source: str = "the call") -> C:
    """`base` with some settings replaced. `values` is nested like the YAML file: a group of settings is a mapping.

    Raises `ConfigError` for an unknown setting or a wrong value.
    """
    if not isinstance(values, Mapping):
        keys = f"keys among {', '.join(vars(base))}"
        raise ConfigError(got=f"{values!r} in {source}", expected=keys, remedy="write each setting as KEY: VALUE")
    return validate(type(base), _merged(to_dict(base), values), source=source)


def _merged(old: Any, new: Any, name: str = "") -> Any:
    """Nested settings `old`, overridden by those in `new`.

    Only the methods listed in `new` stay, and each keeps its other settings. A judge keeps its other settings, too, if
    its kind stays the same. Variables of a template and names of columns are replaced as a whole.
    """
    if dataclasses.is_dataclass(new):
        new = plain(new)
    if name == "methods" and isinstance(new, list | tuple) and len(set(map(str, new))) == len(new):
        new = dict.fromkeys(map(str, new))
    if name in ("prompt.template", "behaviour_columns") or not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    new = {str(key): value for key, value in new.items()}
    if name == "methods":
        old, new = (
            {key: old.get(key, {}) for key in new},
            {key: {} if item is None else item for key, item in new.items()},
        )
    elif new.get("kind", old.get("kind")) != old.get("kind"):
        old = {}
    return {**old, **{key: _merged(old.get(key), item, f"{name}.{key}".strip(".")) for key, item in new.items()}}


def read_bytes(path: str | Path, what: str = "a YAML file", error: type[LocauditError] = ConfigError) -> bytes:
    """Content of a UTF-8 text file. If it does not exist or is not UTF-8, raises `error` with `what` as expectation."""
    path = Path(path)
    if not path.is_file():
        raise error(got=f"{path}, which is not a file", expected=what, remedy="correct the path")
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        raise error(got=f"{path}, which is not UTF-8 text", expected=what, remedy="save it as UTF-8") from None
    return content


def parse_values(text: str, source: str) -> Any:
    """Unchecked values in YAML text; an empty mapping for empty text. Raises `ConfigError` if it is not YAML."""
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(
            got=f"{source}, which is not YAML ({line})", expected="YAML", remedy="correct that line"
        ) from None
    return {} if values is None else values


def preset_text(name: str) -> str:
    """The YAML text of a preset that comes with the package."""
    return resources.files("locaudit").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
