"""Configurations from and to YAML."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from locaudit.config.coerce import merge
from locaudit.config.settings import AuditConfig, to_dict
from locaudit.errors import ConfigError


def to_yaml(config: AuditConfig) -> str:
    """The whole configuration as YAML, every default spelled out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, base: AuditConfig | None = None) -> AuditConfig:
    """Read a YAML file over `base` (default: the defaults). Unknown keys and wrong types raise `ConfigError`."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(got=f"{path}, which is not a file", expected="a YAML file", remedy="check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(got=f"{path}, which is not UTF-8 text", expected="a YAML file", remedy="check it") from None
    return parse_config(text, base, source=str(path))


def load_preset(name: str) -> AuditConfig:
    """A configuration that ships with the package: ``demo``."""
    text = resources.files("locaudit").joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return parse_config(text, source=f"preset {name}")


def parse_config(text: str, base: AuditConfig | None = None, *, source: str = "the text") -> AuditConfig:
    """`load_config` on YAML text."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(got=f"{source}, which is not YAML ({line})", expected="YAML", remedy="mend it") from None
    if values is None:
        values = {}
    return merge(base or AuditConfig(), values, source, "")


def merge_config(base: AuditConfig, values: Mapping[str, Any], *, source: str = "the call") -> AuditConfig:
    """`base` with some fields changed; groups take a mapping. Unknown names and wrong types raise `ConfigError`."""
    return merge(base, values, source, "")
