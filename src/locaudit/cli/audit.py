"""``locaudit demo | audit | probe | report``: words in and out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from locaudit.cli.flags import parse, take_config
from locaudit.config import AuditConfig, load_preset
from locaudit.errors import ConfigError
from locaudit.location import spell_unit


@dataclass(frozen=True)
class _Run:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    out: Path = Path("runs/audit")
    """Run folder: records, edits, verdict and report. Naming an earlier one with the same settings resumes it."""
    repeats: int = 1
    """Audits with other training seeds and question splits, each in its folder ``repeat-N``: one verdict over all."""
    dry_run: bool = False
    """Run the first trials of claim, whole model and controls of each method, and say how long the others would take.
    What was run is kept in the run folder."""


@dataclass(frozen=True)
class _Probe:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    top: int = 16
    """Heads to print."""


@dataclass(frozen=True)
class _Report:
    folder: tyro.conf.Positional[Path]
    """Folder of a run, of repeats or of a study."""
    score: str | None = None
    """Score to read the run by (None: the run's)."""
    level: float | None = None
    """Significance level to read it at (None: the run's)."""
    margin: float | None = None
    """Margin to read it with (None: the run's)."""
    out: Path | None = None
    """Folder of the report (None: the run's own, or with another score, level or margin ``reports/SCORE...`` in it)."""


def demo(arguments: Sequence[str]) -> int:
    """Parse ``locaudit demo [flags]`` and run it; returns the exit code."""
    return _run(
        parse(
            _Run(load_preset("demo"), Path("runs/demo")),
            "locaudit demo",
            "Audit SmolLM2-135M on bundled questions: top-8 probed heads against 19 random sets.",
            arguments,
        )
    )


def audit(arguments: Sequence[str]) -> int:
    """Parse ``locaudit audit [CONFIG.yaml] [flags]`` and run it; returns the exit code."""
    base, rest = take_config(AuditConfig(), arguments)
    words = "Audit a localization claim. Settings come from CONFIG.yaml, if given, and flags go over it."
    return _run(parse(_Run(base), "locaudit audit [CONFIG.yaml]", words, rest))


def probe(arguments: Sequence[str]) -> None:
    """Parse ``locaudit probe [CONFIG.yaml] [flags]`` and print the best heads."""
    base, rest = take_config(AuditConfig(), arguments)
    words = "Probe every head on the training questions and print the best ones."
    command = parse(_Probe(base), "locaudit probe [CONFIG.yaml]", words, rest)
    refuse_early(command.config)
    from locaudit.run.audit import run_probes

    probes = run_probes(command.config)
    location = probes.top(command.top)
    console = Console(highlight=False)
    n_train, n_val = probes.n_train, probes.n_val
    console.print(
        f"validation accuracy ({n_train} training and {n_val} validation examples, majority {probes.majority:.3f})"
    )
    for unit in probes.ranking()[: command.top]:
        console.print(f"  {spell_unit(unit)}\t{probes.val_accuracy[unit].item():.3f}")  # pyright: ignore
    console.print(f'--claim "{location}"')


def report(arguments: Sequence[str]) -> None:
    """Parse ``locaudit report DIR [flags]`` and write it; no model is loaded."""
    words = "Write the report of a finished run again, or read it by another score, level or margin."
    command = tyro.cli(_Report, prog="locaudit report", description=words, args=arguments)
    settings = {"score": command.score, "level": command.level, "margin": command.margin}
    from locaudit.cli.paper import print_study
    from locaudit.cli.shown import print_repeats, print_verdict
    from locaudit.report.repeats import is_repeats
    from locaudit.report.result import read_result
    from locaudit.studies.paper import is_study, write_paper

    if is_study(command.folder):
        if command.out is not None or any(value is not None for value in settings.values()):
            raise ConfigError(
                got=f"another score, level, margin or folder for {command.folder}, a study",
                expected="one of its audits, which can be read by others",
                remedy=f"name its folder, as in: locaudit report {command.folder / 'sets'} --score mc1",
            )
        print_study(write_paper(command.folder))
    elif is_repeats(command.folder):
        print_repeats(command.folder, command.out, **settings)
    else:
        print_verdict(read_result(command.folder, **settings), command.out)


def _run(command: _Run) -> int:
    refuse_early(command.config, command.out if command.repeats == 1 else None)
    from locaudit.cli.shown import count_unjudged, print_repeats, print_verdict
    from locaudit.report import require_report_extra
    from locaudit.report.repeats import repeat_folder
    from locaudit.report.result import read_result
    from locaudit.run.audit import run_audit
    from locaudit.run.pilot import describe_estimate, run_pilot
    from locaudit.run.repeats import check_repeats, repeat_config, run_repeats

    require_report_extra()
    if command.repeats != 1:
        check_repeats(command.config, command.repeats)
    if command.dry_run:
        several = command.repeats > 1
        config, out = (repeat_config(command.config, 0), repeat_folder(command.out, 0)) if several else (
            command.config,
            command.out,
        )  # fmt: skip
        estimate = run_pilot(config, out)
        if several:
            note = f"one repeat: all of them take {command.repeats} times as long, less the time of loading the model"
            estimate = replace(estimate, notes=(*estimate.notes, note))
        print(describe_estimate(estimate))
        return 0
    if command.repeats > 1:
        run_repeats(command.config, command.out, command.repeats)
        return count_unjudged(print_repeats(command.out).runs.values())
    run_audit(command.config, command.out)
    result = read_result(command.out)
    print_verdict(result)
    return count_unjudged([result.run])


def refuse_early(config: AuditConfig, out: Path | None = None) -> None:
    """Refuse what settings and files alone can refuse, before torch is imported, which takes seconds."""
    from locaudit.run.subject import read_settings
    from locaudit.store.folder import check_folder, check_run

    with warnings.catch_warnings(action="ignore"):  # the run reads them again and says the same
        inputs = read_settings(config)
    if out is not None:
        check_folder(out)
        check_run(out, inputs.config, inputs.registration)
