"""Claim files: settings fixed before a run ("pre-registration"), which the command line and YAML cannot override."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locaudit.config.files import merge_config, parse_values, read_bytes
from locaudit.config.settings import READS_ONLY, AuditConfig, leaves
from locaudit.config.validation import to_dict, wrong
from locaudit.errors import ConfigError


@dataclass(frozen=True)
class Registration:
    """The content of a claim file, read by `read_registration`."""

    sha256: str
    """SHA-256 of the file's bytes, 64 hex digits."""
    file: str
    """Name of the file, without its folder."""
    values: Mapping[str, Any]
    """The settings in the file, nested as in `to_dict`. ``claim`` is always there; None: the top-k probed heads."""
    text: str
    """Text of the file, unchanged."""
    reason: str = ""
    """Why the margin is what it is: the file's key ``reason``, which is no setting; empty without one."""

    @property
    def hash(self) -> str:
        """The first 16 digits of `sha256`, which are stored with every trial."""
        return self.sha256[:16]


def read_registration(path: str | Path) -> Registration:
    """Read a claim file: a YAML file of audit settings, which must include ``claim`` or ``probe.top_k``.

    It may also have the key ``reason``: a text that says why the margin is what it is.

    Raises `ConfigError` if neither is there, and for the errors of `load_config`.
    """
    content = read_bytes(path)
    source, text = str(path), content.decode()
    values, reason = parse_values(text, source), ""
    if isinstance(values, Mapping) and "reason" in values:
        reason = values["reason"]
        values = {name: value for name, value in values.items() if name != "reason"}
    if not isinstance(reason, str):
        raise wrong("reason", reason, f"text in {source}", "write why the margin is what it is, in quotes")
    valid = to_dict(merge_config(AuditConfig(), values, source=source))
    if "registered" in values:
        raise ConfigError(
            got=f"registered = {values['registered']!r} in {source}",
            expected="settings that a claim file can fix",
            remedy="delete that line",
        )
    named = _pick(values, valid)
    if "evaluation" in named and named["evaluation"].get("max_new_tokens", 0) is None:
        del named["evaluation"]["max_new_tokens"]  # not fixed: the judges of the run decide it
    if named.get("claim") is None and "top_k" not in named.get("probe", {}):
        raise ConfigError(
            got=f"{source}, which gives no claim",
            expected="the claimed location, or the rule that finds it",
            remedy='add claim: "14.3,15.7", or probe: {top_k: 16} for the 16 best probed heads',
        )
    sha256 = hashlib.sha256(content).hexdigest()
    return Registration(sha256, Path(path).name, {"claim": None} | named, text, reason.strip())


def hold(registration: Registration, config: AuditConfig) -> AuditConfig:
    """`config` with the settings of the claim file.

    Raises `ConfigError` if `config` sets one of them to another value that is not its default.
    """
    default, given = (dict(leaves(to_dict(settings))) for settings in (AuditConfig(), config))
    for name, value in leaves(registration.values):
        if given.get(name, value) not in (default.get(name), value):
            raise ConfigError(
                got=f"{name} = {given[name]}, but {value} in {registration.file}",
                expected="the value that the claim file fixed before the run",
                remedy=f"leave out {name}; or leave out registered (the report of a registered run then lists it)",
            )
    return merge_config(config, registration.values, source=registration.file)


def changed_settings(values: Mapping[str, Any], config: AuditConfig) -> list[str]:
    """Settings whose value differs from the registered one, as text: ``level: 0.05 registered, 0.1 now``."""
    now = dict(leaves(to_dict(config)))
    return [
        f"{name}: {value} registered, {now.get(name)} now" for name, value in leaves(values) if value != now.get(name)
    ]


def open_settings(values: Mapping[str, Any]) -> list[str]:
    """Settings that can still be changed after a run, because no trial depends on them and no claim file fixes them.

    `values` are the settings in the claim file.
    """
    named = {name for name, _ in leaves(values)}
    every = [name for name, _ in leaves(to_dict(merge_config(AuditConfig(), values)))]
    found: list[str] = []
    for group in READS_ONLY:
        inside = [leaf for leaf in every if leaf.partition(".")[0] == group]
        left = [leaf for leaf in inside if leaf not in named]
        found += [group] if left == inside else left  # the name of a group stands for all its settings
    return found


def _pick(names: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of nested `values` whose keys occur in `names`, a nested mapping or a list of keys."""
    if not isinstance(names, Mapping):
        names = dict.fromkeys(names, {})
    return {
        key: _pick(names[key] or {}, value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key in names
    }
