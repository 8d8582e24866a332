"""Configurations from and to YAML."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from locaudit.config.coerce import merge
from locaudit.config.settings import AuditConfig, to_dict
from locaudit.errors import ConfigError

C = TypeVar("C")
"""A settings class."""


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML, every default spelled out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, base: AuditConfig | None = None) -> AuditConfig:
    """Read a YAML file over `base` (default: the defaults). Unknown keys and wrong types raise `ConfigError`."""
    return read_over(base or AuditConfig(), path)


def load_preset(name: str) -> AuditConfig:
    """A configuration that ships with the package: ``demo``."""
    return parse_over(AuditConfig(), preset_text(name), f"preset {name}")


def parse_config(text: str, base: AuditConfig | None = None, *, source: str = "the text") -> AuditConfig:
    """`load_config` on YAML text."""
    return parse_over(base or AuditConfig(), text, source)


def merge_config(base: C, values: Mapping[str, Any], *, source: str = "the call") -> C:
    """`base` with some fields changed; groups take a mapping. Unknown names and wrong types raise `ConfigError`."""
    return merge(base, values, source, "")


def read_over(base: C, path: str | Path) -> C:
    """Settings of any class with those of a YAML file in place of `base`'s."""
    return parse_over(base, read_bytes(path).decode(), str(path))


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


def parse_over(base: C, text: str, source: str) -> C:
    """`read_over` on YAML text."""
    return merge(base, parse_values(text, source), source, "")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_values(text: str, source: str) -> Any:
    """What YAML text holds, not checked; nothing is no settings."""
    try:
        values = yaml.load(text, _UniqueKeys)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(got=f"{source}, which is not YAML ({line})", expected="YAML", remedy="mend it") from None
    return {} if values is None else values


def preset_text(name: str) -> str:
    """YAML of a preset that ships with the package."""
    return resources.files("locaudit").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
