"""A claim file: settings fixed before a run ("pre-registration"), which hold whatever else is given."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locaudit.config.files import merge_config, parse_values, read_bytes
from locaudit.config.settings import READS_ONLY, AuditConfig, leaves
from locaudit.config.validation import to_dict
from locaudit.errors import ConfigError


@dataclass(frozen=True)
class Registration:
    """What a claim file says. Made by `read_registration`."""

    sha256: str
    """Of the file's bytes, 64 hex digits."""
    file: str
    """The file's name."""
    values: Mapping[str, Any]
    """The settings that it names, nested as in `to_dict`; ``claim`` always, None for the top-k probed heads."""
    text: str
    """The file as it was written."""

    @property
    def hash(self) -> str:
        """The first 16 digits, which every record carries."""
        return self.sha256[:16]


def read_registration(path: str | Path) -> Registration:
    """Read a claim file: YAML with any settings of an audit, the claim or ``probe.top_k`` among them.

    Raises `ConfigError` for anything else, as for a configuration.
    """
    content = read_bytes(path)
    source, text = str(path), content.decode()
    values = parse_values(text, source)
    valid = to_dict(merge_config(AuditConfig(), values, source=source))
    if "registered" in values:
        raise ConfigError(
            got=f"registered = {values['registered']!r} in {source}",
            expected="settings that a claim file can fix",
            remedy="drop that line",
        )
    named = _pick(values, valid)
    if "evaluation" in named and named["evaluation"].get("max_new_tokens", 0) is None:
        del named["evaluation"]["max_new_tokens"]  # left open: a run resolves it by its judges
    if named.get("claim") is None and "top_k" not in named.get("probe", {}):
        raise ConfigError(
            got=f"{source}, which names no claim",
            expected="the claimed location, or the rule that finds it",
            remedy='add claim: "14.3,15.7", or probe: {top_k: 16} for the 16 best probed heads',
        )
    return Registration(hashlib.sha256(content).hexdigest(), Path(path).name, {"claim": None} | named, text)


def hold(registration: Registration, config: AuditConfig) -> AuditConfig:
    """The settings with those of the claim file.

    One that was given otherwise, as its default excepted, raises `ConfigError`.
    """
    default, given = (dict(leaves(to_dict(settings))) for settings in (AuditConfig(), config))
    for name, value in leaves(registration.values):
        if given.get(name, value) not in (default.get(name), value):
            raise ConfigError(
                got=f"{name} = {given[name]}, and {value} in {registration.file}",
                expected="what the claim file fixed before the run",
                remedy=f"leave {name} out; or leave registered out, and the report of a registered run says what "
                "was changed",
            )
    return merge_config(config, registration.values, source=registration.file)


def changed_settings(values: Mapping[str, Any], config: AuditConfig) -> list[str]:
    """Settings whose registered value is not the present one: ``level: 0.05 registered, 0.1 now``."""
    now = dict(leaves(to_dict(config)))
    return [
        f"{name}: {value} registered, {now.get(name)} now" for name, value in leaves(values) if value != now.get(name)
    ]


def open_settings(values: Mapping[str, Any]) -> list[str]:
    """Settings that a finished run can still take another value of, since its claim file does not name them."""
    named = {name for name, _ in leaves(values)}
    every = [name for name, _ in leaves(to_dict(merge_config(AuditConfig(), values)))]
    found: list[str] = []
    for group in READS_ONLY:
        inside = [leaf for leaf in every if leaf.partition(".")[0] == group]
        left = [leaf for leaf in inside if leaf not in named]
        found += [group] if left == inside else left  # a group of which nothing is named is called by its own name
    return found


def _pick(names: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of nested `values`, those under the keys of `names`, which may be a list of them."""
    if not isinstance(names, Mapping):
        names = dict.fromkeys(names, {})
    return {
        key: _pick(names[key] or {}, value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key in names
    }
