"""Test several rules that find places: the best places of each against the same random places."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.behaviours import Behaviour
from locaudit.claims import parse_location
from locaudit.claims.spelling import ALIASES
from locaudit.config import AuditConfig
from locaudit.errors import ConfigError, RunFolderError
from locaudit.judges import Judge
from locaudit.location import Positions
from locaudit.methods.base import PatchWith
from locaudit.registry import RULES
from locaudit.run.status import show_progress
from locaudit.run.subject import load_subject, read_inputs
from locaudit.store.files import write_atomically
from locaudit.store.folder import has_trials, saved_config

if TYPE_CHECKING:  # so that rules are refused without torch
    from locaudit.models import Model

CHOSEN = "heuristics.json"
"""File with the settings by which the claims of a comparison were chosen."""


def run_heuristics(
    config: AuditConfig,
    out: str | Path,
    rules: Sequence[str],
    k: int,
    kind: str = "head",
    *,
    patch_with: PatchWith = "mean",
    positions: Positions = "all",
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> list[Path]:
    """Audit the k best places of each rule, into the run folders ``out/RULE``, and return these folders.

    All audits have the same settings but the claim. Their controls of the null ``anywhere`` are the same random places,
    because these depend on the seed and the claim's size only (a rule's own claim is never among its controls). Trials
    that audits share, which are the controls, the unedited and the whole model, run once. With ``epochs: auto`` they
    are shared by rules whose claims train equally long.

    `patch_with` and `positions` are those of `find_places`, for the rules that replace a unit's output.

    Like `run_audit`, this can be interrupted and resumed; a begun audit keeps its claim. The scores of all places are
    written to ``out/RULE.csv``. Raises `RunFolderError` for a begun comparison whose claims were chosen with another
    `k`, `kind`, `patch_with` or `positions`, and the errors of `find_places` and of `run_audit`.
    """
    check_rules(config, rules, k)
    from locaudit.run.audit import run_audit
    from locaudit.run.find import check_patching, prepare_training, rank

    check_patching(rules, patch_with, positions)
    kind = ALIASES.get(kind, kind)
    chosen = {"k": k, "kind": kind, "patch_with": patch_with, "positions": positions}
    _check_chosen(Path(out), chosen)
    folders = [Path(out) / by for by in rules]
    inputs = read_inputs(config, behaviour, judges, model, folders[0], audits=False)
    config = replace(config, prompt=inputs.config.prompt)  # all audits have the date of the first one
    claims = [_begun_claim(folder, k, kind) for folder in folders]
    with show_progress(progress) as meter:
        if model is None:
            meter.say(f"loading {config.model}")
            model = load_subject(config)
        if None in claims:
            preparing = prepare_training(
                config, kind, model, inputs.behaviour, meter.say, patch_with=patch_with, positions=positions
            )
            Path(out).mkdir(parents=True, exist_ok=True)
            write_atomically(Path(out) / CHOSEN, json.dumps(chosen).encode())
            for number, by in enumerate(rules):
                if claims[number] is None:
                    found = rank(preparing, by)
                    found.save(Path(out) / f"{by}.csv")
                    claims[number] = str(found.top(k))
    for number, (by, folder) in enumerate(zip(rules, folders, strict=True)):
        with show_progress(progress) as meter:
            meter.say(f"rule {number + 1} of {len(rules)}, {by}: {claims[number]}")
        run_audit(
            replace(config, claim=claims[number]),
            folder,
            model=model,
            behaviour=inputs.behaviour,
            judges=inputs.judges,
            progress=progress,
            prepared=folders[0] if number else None,
            borrowed=folders[:number],
        )
    return folders


def check_rules(config: AuditConfig, rules: Sequence[str], k: int) -> None:
    """Raise `ConfigError` if rules cannot be compared with these settings."""
    given = [name for name in ("claim", "registered") if getattr(config, name) is not None]
    if given or len(set(rules)) < max(len(rules), 2) or k < 1:
        raise ConfigError(
            got=f"the rules {', '.join(rules)} with k = {k}" + "".join(f" and {name}" for name in given),
            expected="two or more rules, each once, which choose the claims, and k of at least 1",
            remedy="name the rules with --rules, and leave claim and registered out",
        )
    for by in rules:
        _ = RULES[by]


def _check_chosen(out: Path, chosen: Mapping[str, object]) -> None:
    """Raise `RunFolderError` if trials in the folder are of claims that were chosen with other settings."""
    if (out / CHOSEN).is_file() and any(has_trials(file.parent) for file in out.glob("*/trials.sqlite")):
        _check_same(out, json.loads((out / CHOSEN).read_text()), chosen)


def _check_same(folder: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    changed = [f"{name}: {old} there, {now[name]} here" for name, old in before.items() if now[name] != old]
    if changed:
        raise RunFolderError(
            got=f"{folder}, whose claim was chosen with other settings ({'; '.join(changed)})",
            expected="the same kind and number of places, chosen in the same way",
            remedy="choose another --out, or repeat the earlier settings to resume",
        )


def _begun_claim(folder: Path, k: int, kind: str) -> str | None:
    """The claim of an audit that was begun in the folder; None if there is none."""
    before = saved_config(folder) if has_trials(folder) else None
    if before is None or not before.claim:
        return None
    claim = parse_location(before.claim)
    _check_same(folder, {"k": len(claim), "kind": claim.kind}, {"k": k, "kind": kind})
    return before.claim
