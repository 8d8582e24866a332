"""The same audit several times, with other training seeds and question splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from locaudit.config import AuditConfig
from locaudit.config.settings import leaves
from locaudit.data import Behaviour
from locaudit.errors import ConfigError
from locaudit.judges import Judge
from locaudit.models import Model
from locaudit.report.repeats import read_plan, repeat_folder, write_plan
from locaudit.runner.inputs import load_subject, read_inputs
from locaudit.runner.run import run_audit


def repeat_config(config: AuditConfig, number: int) -> AuditConfig:
    """Repeat `number` (from 0, the audit itself): the same seed of controls, another of training and split."""
    split = dataclasses.replace(config.split, seed=config.split.seed + number)
    seed = config.seed if config.training_seed is None else config.training_seed
    return dataclasses.replace(config, training_seed=seed + number, split=split)


def check_repeats(config: AuditConfig, repeats: int) -> None:
    """Raise `ConfigError` unless the audit can be repeated so often."""
    if repeats < 2 or config.stopping != "fixed":
        raise ConfigError(
            got=f"{repeats} repeats with stopping = {config.stopping}",
            expected="at least 2, each with all of its controls",
            remedy="raise --repeats; leave out --stopping",
        )


def run_repeats(
    config: AuditConfig,
    out: str | Path,
    repeats: int,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> None:
    """Run ``repeat-0``, ``repeat-1``, ... under `out`, each a run folder; `locaudit.report.repeats` has their verdict.

    Resumes as `run_audit` does. Behaviours with a split of their own keep it, and only training seeds differ.
    """
    inputs = read_inputs(config, behaviour, judges, model)
    check_repeats(inputs.config, repeats)
    held = dict(leaves(inputs.registration.values)) if inputs.registration else {}
    if fixed := [name for name in ("split.seed", "training_seed") if name in held]:
        raise ConfigError(
            got=f"--repeats {repeats} and a claim file that fixes {' and '.join(fixed)}",
            expected="seeds that differ between repeats",
            remedy="leave them out of the claim file: repeats count up from split.seed and seed",
        )
    if repeats < (found := max(read_plan(out), default=0)):
        raise ConfigError(
            got=f"{repeats} repeats, and {found} planned in {out}",
            expected="at least as many: the verdict is that of all that were planned",
            remedy=f"give --repeats {found}, or another --out",
        )
    config = inputs.config
    model = model or load_subject(config)
    write_plan(out, repeats)
    for number in range(repeats):
        run_audit(
            repeat_config(config, number),
            repeat_folder(out, number),
            model=model,
            behaviour=behaviour,
            judges=judges,
            progress=progress,
        )
