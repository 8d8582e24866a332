"""``locaudit find | heuristics``: rank places by a rule, and test which rule finds better places than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from locaudit.claims.spelling import ALIASES
from locaudit.cli.audit import refuse_early
from locaudit.cli.commands import say
from locaudit.cli.compare import print_comparison
from locaudit.cli.flags import parse, take_config
from locaudit.cli.shown import count_unjudged
from locaudit.config import AuditConfig, merge_config
from locaudit.errors import ConfigError
from locaudit.location import Positions, spell_unit
from locaudit.methods.base import PatchWith
from locaudit.registry import KINDS, RULES
from locaudit.report import require_report_extra
from locaudit.run.heuristics import check_rules, run_heuristics
from locaudit.run.subject import few_for_no
from locaudit.text import plural

_ALIKE = {"nulls": ["anywhere"], "methods": ["optimal"], "rest": False}
"""What the audits of rules have by default: the same random places, and no edits of everything but the claim."""

_OF_AN_AUDIT = ("claim", "methods", "controls", "score", "ray.workers")
"""Settings of an audit that a ranking does not need."""


@dataclass(frozen=True)
class _Find:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    by: str = "probe"
    """Rule: ``probe``, ``mean-difference``, ``gradient``, ``patching``, or one added by a plug-in (docs/claims.md)."""
    kind: str = "head"
    """Kind of place: ``head``, ``kv-group``, ``attention``, ``neuron``, ``mlp`` or ``residual``."""
    patch_with: PatchWith = "mean"
    """What ``gradient`` and ``patching`` replace a unit's output by.
    ``mean``: its mean over the training texts. ``pair``: its value after the question's ``paired`` prompt."""
    positions: Positions = "all"
    """Tokens at which they replace it: ``all``, ``prompt``, ``answer``, ``last`` or ``subject``."""
    top: int = 16
    """Number of places to print."""
    out: Path | None = None
    """CSV file for the scores of all places, which ``--claim`` reads (None: none is written)."""


@dataclass(frozen=True)
class _Heuristics:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(
        default_factory=lambda: merge_config(AuditConfig(), _ALIKE)
    )
    rules: tuple[str, ...] = ("probe", "mean-difference", "gradient")
    """Rules to compare, two or more: ``probe``, ``mean-difference``, ``gradient``, ``patching``, or of a plug-in."""
    k: int = 16
    """Number of places that each rule chooses, and that each random set has."""
    kind: str = "head"
    """Kind of place, as in ``locaudit find``."""
    patch_with: PatchWith = "mean"
    """What ``gradient`` and ``patching`` replace a unit's output by, as in ``locaudit find``."""
    positions: Positions = "all"
    """Tokens at which they replace it, as in ``locaudit find``. Edits have ``--methods.optimal.positions``."""
    out: Path = Path("runs/heuristics")
    """Folder with the run folder of each rule, the scores of all places, compare.html and compare.csv."""


def heuristics(arguments: Sequence[str]) -> int:
    """Parse ``locaudit heuristics [CONFIG.yaml] [flags]``, run an audit for each rule, and print them side by side."""
    base, rest = take_config(_Heuristics().config, arguments)
    words = "Does a rule find better places than chance? The best places of each rule against the same random places."
    command = parse(_Heuristics(base), "locaudit heuristics [CONFIG.yaml]", words, rest, unused=("claim",))
    require_report_extra()
    _ = KINDS[ALIASES.get(command.kind, command.kind)]
    check_rules(command.config, command.rules, command.k)
    inputs = refuse_early(command.config, audits=False)
    if few := few_for_no(inputs.behaviour, inputs.config.split):
        say(f"locaudit: {few}", stderr=True)
    from locaudit.report.compare import write_comparison
    from locaudit.report.result import read_result

    folders = run_heuristics(
        command.config,
        command.out,
        command.rules,
        command.k,
        command.kind,
        patch_with=command.patch_with,
        positions=command.positions,
    )
    runs = [read_result(folder) for folder in folders]
    for run in runs:
        run.write_report()
    print_comparison(*write_comparison(folders, command.out))
    return count_unjudged([run.run for run in runs])


def find(arguments: Sequence[str]) -> None:
    """Parse ``locaudit find [CONFIG.yaml] [flags]``, print the best places, and write the scores of all."""
    base, rest = take_config(AuditConfig(), arguments)
    words = "Rank every head, or place of another kind, on the training questions, and print the best ones."
    command = parse(_Find(base), "locaudit find [CONFIG.yaml]", words, rest, unused=_OF_AN_AUDIT)
    if command.top < 1:
        raise ConfigError(got=f"--top {command.top}", expected="at least 1", remedy="raise it")
    _ = RULES[command.by], KINDS[ALIASES.get(command.kind, command.kind)]
    refuse_early(command.config, audits=False)
    from locaudit.run.find import find_places

    found = find_places(
        command.config, command.by, command.kind, patch_with=command.patch_with, positions=command.positions
    )
    say(f"{command.by}: {found.means}")
    top = min(command.top, len(found.scores))
    for unit, score in list(found.scores.items())[:top]:
        change = f"\t{found.changes[unit]:+.4g}" if found.changes else ""
        say(f"  {spell_unit(unit)}\t{score:.4g}{change}")
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
        found.save(command.out)
    k = top
    while k and list(found.scores.values())[k - 1] == 0:
        k -= 1
    if k < top:
        say(f"locaudit: left out of --claim: {plural(top - k, 'place')} with the score 0", stderr=True)
    if k == len(found.scores):
        say(f"locaudit: all {k} places are the whole model, which is no claim: lower --top", stderr=True)
    elif k:
        if command.out is not None:
            kind = f"{found.kind}:" if KINDS[found.kind].whole_layers else ""  # their columns do not say the kind
            say(f"--claim {kind}{command.out} --claim-top-k {k}")
        say(f'--claim "{found.top(k)}"')
