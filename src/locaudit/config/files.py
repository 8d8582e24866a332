"""Configurations from and to YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from locaudit.config.settings import AuditConfig
from locaudit.config.validation import plain, refuse_old, to_dict, validate
from locaudit.errors import ConfigError

C = TypeVar("C")
"""A settings class."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):  # 1e-3 is a number to everyone but YAML 1.1, which wants 1.0e-3
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML, every default spelled out."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, base: AuditConfig | None = None) -> AuditConfig:
    """Read a YAML file over `base` (default: the defaults). Unknown keys and wrong types raise `ConfigError`."""
    return read_over(base or AuditConfig(), path)


def load_preset(name: str) -> AuditConfig:
    """A configuration that ships with the package: ``demo``."""
    return parse_over(AuditConfig(), preset_text(name), f"preset {name}")


def parse_config(text: str, base: AuditConfig | None = None, *, source: str = "the text") -> AuditConfig:
    """`load_config` on YAML text."""
    return parse_over(base or AuditConfig(), text, source)


def read_over(base: C, path: str | Path) -> C:
    """Settings of any class with those of a YAML file in place of `base`'s."""
    return parse_over(base, read_bytes(path).decode(), str(path))


def parse_over(base: C, text: str, source: str) -> C:
    """`read_over` on YAML text."""
    return merge_config(base, parse_values(text, source), source=source)


def merge_config(base: C, values: Any, *, source: str = "the call") -> C:
    """`base` with some settings changed; groups take a mapping. Unknown names and wrong types raise `ConfigError`."""
    if not isinstance(values, Mapping):
        keys = f"keys among {', '.join(vars(base))}"
        raise ConfigError(got=f"a document = {values!r} in {source}", expected=keys, remedy="indent the settings")
    refuse_old(values, vars(base), source)
    return validate(type(base), _merged(to_dict(base), values), source=source)


def _merged(old: Any, new: Any, name: str = "") -> Any:
    """Nested settings `old` with those of `new`.

    A list or mapping of methods says which are run; each keeps its other settings. So does a judge of the same kind.
    """
    if dataclasses.is_dataclass(new):
        new = plain(new)
    if name == "methods" and isinstance(new, list | tuple) and len(set(map(str, new))) == len(new):
        new = dict.fromkeys(map(str, new))
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
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


def read_bytes(path: str | Path) -> bytes:
    """Content of a text file in UTF-8; `ConfigError` for any other."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(got=f"{path}, which is not a file", expected="a YAML file", remedy="check the path")
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError:
        raise ConfigError(got=f"{path}, which is not UTF-8 text", expected="a YAML file", remedy="check it") from None
    return content


def parse_values(text: str, source: str) -> Any:
    """What YAML text holds, not checked; nothing is no settings."""
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(got=f"{source}, which is not YAML ({line})", expected="YAML", remedy="mend it") from None
    return {} if values is None else values


def preset_text(name: str) -> str:
    """YAML of a preset that ships with the package."""
    return resources.files("locaudit").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
