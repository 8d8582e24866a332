"""``locaudit find``: rank places by a rule, to claim the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from locaudit.claims.spelling import ALIASES
from locaudit.cli.audit import refuse_early
from locaudit.cli.commands import say
from locaudit.cli.flags import parse, take_config
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError
from locaudit.location import spell_unit
from locaudit.registry import KINDS, RULES


@dataclass(frozen=True)
class _Find:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    by: str = "probe"
    """Rule: ``probe``, ``mean-difference``, ``gradient``, ``patching``, or one added by a plug-in (docs/claims.md)."""
    kind: str = "head"
    """Kind of place: ``head``, ``kv-group``, ``attention``, ``neuron``, ``mlp`` or ``residual``."""
    top: int = 16
    """Number of places to print."""
    out: Path | None = None
    """CSV file for the scores of all places, which ``--claim`` reads (None: none is written)."""


def find(arguments: Sequence[str]) -> None:
    """Parse ``locaudit find [CONFIG.yaml] [flags]``, print the best places, and write the scores of all."""
    base, rest = take_config(AuditConfig(), arguments)
    words = "Rank every head, or place of another kind, on the training questions, and print the best ones."
    command = parse(_Find(base), "locaudit find [CONFIG.yaml]", words, rest)
    if command.top < 1:
        raise ConfigError(got=f"--top {command.top}", expected="at least 1", remedy="raise it")
    _ = RULES[command.by], KINDS[ALIASES.get(command.kind, command.kind)]
    refuse_early(command.config)
    from locaudit.run.find import find_places

    found = find_places(command.config, command.by, command.kind)
    say(f"{command.by}: {found.means}")
    top = min(command.top, len(found.scores))
    for unit, score in list(found.scores.items())[:top]:
        change = f"\t{found.changes[unit]:+.4g}" if found.changes else ""
        say(f"  {spell_unit(unit)}\t{score:.4g}{change}")
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        found.save(command.out)
        kind = f"{found.kind}:" if KINDS[found.kind].whole_layers else ""  # their columns do not say the kind
        say(f"--claim {kind}{command.out} --claim-top-k {top}")
    say(f'--claim "{found.top(top)}"')
