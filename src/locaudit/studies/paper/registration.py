"""The claim file of a study: rules that are fixed before the run, and whether they were committed by then."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from locaudit.errors import RunFolderError
from locaudit.records import json_text
from locaudit.store.files import write_atomically

CLAIMS = "claims.yaml"
"""The claims and their rules: in the package, and as a copy in the folder of each study."""
_FACTS = "registration.json"
_RULES = "level", "margin", "least_questions", "most_diverged", "power", "claims"
_CLAIM = "name", "section", "says", "estimand", "rule", "test", "score", "of", "is"
"""What the claim file has, and each of its claims."""


@dataclass(frozen=True)
class Registration:
    """The claim file of a study."""

    sha256: str
    """Hash of the claim file when the study began."""
    begun: str
    """When the study began (UTC)."""
    commit: str
    """Commit and date of the claim file if it was committed unchanged when the study began; empty otherwise."""
    changed: bool = False
    """Whether the copy in the study's folder is another file now."""

    @property
    def sentence(self) -> str:
        """What is known about the rules, in a sentence."""
        if self.changed:
            return f"The rules (claims.yaml) were changed after the study began at {self.begun}: they were not fixed."
        how = f"committed as {self.commit}" if self.commit else "not known to be committed"
        return f"The rules (claims.yaml, SHA-256 {self.sha256[:16]}) were {how} when the study began at {self.begun}."


def register(folder: Path) -> Registration:
    """Copy the package's claim file into a new study; a study that has begun keeps its own."""
    if not (folder / _FACTS).is_file():
        source = Path(__file__).with_name(CLAIMS)
        content, now = source.read_bytes(), datetime.now(UTC).isoformat(timespec="seconds")
        write_atomically(folder / CLAIMS, content)
        facts = Registration(hashlib.sha256(content).hexdigest(), now, committed(source))
        write_atomically(folder / _FACTS, json_text(asdict(facts)).encode())
    return read_rules(folder)[1]


def read_rules(folder: Path) -> tuple[Mapping[str, Any], Registration]:
    """The claims and rules of a study, and what is known about their file.

    Raises `RunFolderError` for a study of an earlier version, which has no such file, and for a broken file.
    """
    if not (folder / _FACTS).is_file():
        raise RunFolderError(
            got=f"{folder} without {_FACTS}, a study of an earlier version",
            expected="a study that began with fixed rules",
            remedy="read its numbers.json, or run the study again into another --out",
        )
    content = (folder / CLAIMS).read_bytes()
    try:
        facts, rules = json.loads((folder / _FACTS).read_text(encoding="utf-8")), yaml.safe_load(content)
        known = Registration(**{name: facts[name] for name in ("sha256", "begun", "commit")})
        lacking = [name for name in _RULES if name not in rules]
        lacking += [f"{claim['name']}: {key}" for claim in rules["claims"] for key in _CLAIM if key not in claim]
        if lacking:
            raise ValueError(lacking[0])
    except (ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise RunFolderError(
            got=f"{folder} whose {CLAIMS} or {_FACTS} is broken or lacks something ({error})",
            expected="both files as locaudit paper wrote them",
            remedy="restore them",
        ) from None
    return rules, replace(known, changed=hashlib.sha256(content).hexdigest() != known.sha256)


def committed(path: Path) -> str:
    """The last commit of a file and its date; empty if it has changed since, or is not in a Git repository."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments, "--", path.name], cwd=path.parent, capture_output=True, text=True)
        except OSError:  # no Git
            return ""
        return done.stdout.strip()

    return "" if git("status", "--porcelain") else git("log", "-1", "--format=%h of %cI")
