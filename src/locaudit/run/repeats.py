"""Run the same audit several times, with other training seeds and question splits, primers or wordings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locaudit.behaviours import Behaviour
from locaudit.config import AuditConfig, Registration, merge_config, to_dict
from locaudit.config.settings import VARIED, leaves
from locaudit.errors import ConfigError, RunFolderError
from locaudit.judges import Judge
from locaudit.run.executors import loads_by_name
from locaudit.run.plan import training_seed
from locaudit.run.status import say_resumed, show_progress
from locaudit.run.subject import load_subject, read_inputs, read_settings
from locaudit.store.folder import check_folder, check_run, read_run
from locaudit.store.repeats import MOST, PLAN, read_plan, repeat_folder, write_plan

if TYPE_CHECKING:  # so that a number of repeats is refused without torch
    from locaudit.models import Model


def repeat_config(config: AuditConfig, number: int) -> AuditConfig:
    """Settings of repeat `number`: those that `vary` names are counted up, controls stay. Repeat 0 is `config`."""
    config = dataclasses.replace(config, training_seed=training_seed(config))
    now = dict(leaves(to_dict(config)))
    changed: dict[str, Any] = {}
    for name in (name for what in config.vary for name in VARIED[what]):
        group, _, field = name.rpartition(".")
        (changed.setdefault(group, {}) if group else changed)[field] = now[name] + number
    return merge_config(config, changed)


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
    """Run an audit `repeats` times, into the run folders ``repeat-0``, ``repeat-1``, ... in `out`.

    The audits differ in what ``vary`` of the settings names. Like `run_audit`, this can be interrupted and resumed. A
    behaviour with a fixed split keeps it, so that only the training seeds differ. `locaudit.report.repeats` combines
    the verdicts. Raises `ConfigError` if the number of repeats is out of range or lower than before, and the errors of
    `run_audit`.
    """
    inputs = read_inputs(config, behaviour, judges, model, repeat_folder(out, 0))
    config, registration = inputs.config, inputs.registration
    del inputs  # frees the memory of its judges, because each audit loads its own
    if repeats > 1:  # as many wordings as are needed
        read_settings(repeat_config(config, repeats - 1), behaviour, judges, model)
    check_repeats(config, out, repeats, registration)
    write_plan(out, repeats)
    with show_progress(progress) as meter:
        say_resumed([repeat_folder(out, number) for number in range(repeats)], "repeats", meter)
    from locaudit.run.audit import run_audit

    if model is None and not loads_by_name(config):  # else each audit loads it, as its workers do
        model = load_subject(config)
    for number in range(repeats):
        run_audit(
            repeat_config(config, number),
            repeat_folder(out, number),
            model=model,
            behaviour=behaviour,
            judges=judges,
            progress=progress,
        )


def check_repeats(config: AuditConfig, out: str | Path, repeats: int, registration: Registration | None) -> None:
    """Raise those errors of `run_repeats` that can be found in settings and run folder, before anything is loaded.

    `config` already includes the settings of the claim file.
    """
    if not 2 <= repeats <= MOST:
        raise ConfigError(
            got=f"{repeats} repeats", expected=f"2 to {MOST}", remedy="change --repeats; leave it out for one audit"
        )
    if config.stopping != "fixed":
        raise ConfigError(
            got=f"{repeats} repeats with stopping = {config.stopping}",
            expected="stopping = fixed, because repeats need all of their controls",
            remedy="set stopping to fixed",
        )
    held = dict(leaves(registration.values)) if registration else {}
    if not config.vary:
        raise ConfigError(
            got=f"{repeats} repeats that vary nothing", expected="seed, primer or wording", remedy="set --vary"
        )
    if fixed := [name for what in config.vary for name in sorted(VARIED[what]) if name in held]:
        raise ConfigError(
            got=f"--repeats {repeats} and a claim file that fixes {' and '.join(fixed)}",
            expected="settings that differ between repeats",
            remedy="leave them out of the claim file: repeats count up from them",
        )
    if (Path(out) / "config.yaml").exists() or (Path(out) / "paper.yaml").exists():
        raise RunFolderError(
            got=f"{out}, which a single audit or a study wrote",
            expected="a new folder, or that of earlier repeats",
            remedy="choose another --out",
        )
    check_folder(out, PLAN)
    if repeats < (found := max(read_plan(out), default=0)):
        raise ConfigError(
            got=f"{repeats} repeats, but {found} were planned in {out}",
            expected=f"at least {found}, since the verdict is over all planned repeats",
            remedy=f"give --repeats {found}, or another --out",
        )
    folders = [repeat_folder(out, number) for number in range(repeats)]
    begun = [
        folder
        for number, folder in enumerate(folders)
        if check_run(folder, repeat_config(config, number), registration)
    ]
    for folder in begun:
        with read_run(folder) as store:
            before = store.manifest.registration if store.manifest else None
        if registration is None and before is not None and len(begun) < repeats:
            raise RunFolderError(
                got=f"new repeats without a claim file in {out}, whose first repeats have the claim file {before.file}",
                expected="the same claim file for all repeats",
                remedy="name it again with --registered",
            )
