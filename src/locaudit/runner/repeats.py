"""The same audit several times, with other training seeds and question splits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from locaudit.config import AuditConfig
from locaudit.config.settings import leaves
from locaudit.data import Behaviour
from locaudit.errors import ConfigError
from locaudit.judges import Judge
from locaudit.models import Model
from locaudit.runner.inputs import load_subject, read_inputs
from locaudit.runner.run import run_audit
from locaudit.stats import decide_run, judged_records
from locaudit.stats.repeats import RepeatsVerdict, combine_repeats
from locaudit.store import read_run, write_atomically


def repeat_config(config: AuditConfig, number: int) -> AuditConfig:
    """Repeat `number` (from 0, the audit itself): the same seed of controls, another of training and split."""
    split = dataclasses.replace(config.split, seed=config.split.seed + number)
    seed = config.seed if config.training_seed is None else config.training_seed
    return dataclasses.replace(config, training_seed=seed + number, split=split)


def run_repeats(
    config: AuditConfig,
    out: str | Path,
    repeats: int,
    *,
    model: Model | None = None,
    behaviour: Behaviour | None = None,
    judges: Mapping[str, Judge] | None = None,
    progress: bool = True,
) -> RepeatsVerdict:
    """Run ``repeat-0``, ``repeat-1``, ... under `out`, each a run folder; write ``repeats.json``; return its verdict.

    Resumes as `run_audit` does. Behaviours with a split of their own keep it, and only training seeds differ.
    """
    if repeats < 2 or config.stopping != "fixed":
        raise ConfigError(
            got=f"{repeats} repeats with stopping = {config.stopping}",
            expected="at least 2, each with all of its controls",
            remedy="raise --repeats; leave out --stopping",
        )
    inputs = read_inputs(config, behaviour, judges, model)
    held = dict(leaves(inputs.registration.values)) if inputs.registration else {}
    if fixed := [name for name in ("split.seed", "training_seed") if name in held]:
        raise ConfigError(
            got=f"--repeats {repeats} and a claim file that fixes {' and '.join(fixed)}",
            expected="seeds that differ between repeats",
            remedy="leave them out of the claim file: repeats count up from split.seed and seed",
        )
    config = inputs.config
    model = model or load_subject(config)
    folders = [Path(out) / f"repeat-{number}" for number in range(repeats)]
    for number, folder in enumerate(folders):
        run_audit(
            repeat_config(config, number), folder, model=model, behaviour=behaviour, judges=judges, progress=progress
        )
    verdict = read_repeats(folders)
    write_atomically(Path(out) / "repeats.json", (json.dumps(asdict(verdict), indent=2) + "\n").encode())
    return verdict


def read_repeats(folders: list[Path]) -> RepeatsVerdict:
    """The verdict over run folders that are repeats of each other."""
    verdicts, claims, controls = [], [], []
    for folder in folders:
        with read_run(folder) as store:
            records = judged_records(store)
            verdicts.append(decide_run(store, records))
            places = {r.spec.control: r.spec.location for r in records if r.spec.arm == "control"}
            controls.append([places[number] for number in sorted(places)])
            claims.append((store.fact("run") or {})["claim"])
    return combine_repeats(verdicts, claims, controls)
