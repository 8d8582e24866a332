"""``locaudit demo | audit | report``: read the flags, call the library, print the result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from locaudit.cli.commands import read_flags, say
from locaudit.cli.flags import parse, take_config
from locaudit.config import AuditConfig, load_preset
from locaudit.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from locaudit.run.subject import Inputs

_POSITIVE = "--positive"
_DEMO = (
    "Audit SmolLM2-135M on the bundled behaviour sentiment: the 16 best probed heads against random sets of 16. "
    f"With {_POSITIVE}, the 8 heads that the same short training moves fastest. They were "
    "found on training prompts only (docs/demo.md)."
)


@dataclass(frozen=True)
class _Run:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    out: Path = Path("runs/audit")
    """Run folder, for results, edits, verdict and report.
    An earlier run with the same settings in this folder is resumed."""
    repeats: int = 1
    """Number of audits that differ in what `vary` names (seeds and splits). One verdict is given over all of them.
    Each audit has its own folder, ``repeat-N``, in the run folder."""
    labels: Path | None = None
    """File of trusted labels of the run's answers, which correct the judged scores (docs/judges.md)."""
    dry_run: bool = False
    """Run only the first trials of each method and print how long the rest would take.
    These trials are kept in the run folder, so the audit does not repeat them."""


@dataclass(frozen=True)
class _Report:
    folder: tyro.conf.Positional[Path]
    """Folder of a run, of repeats or of a study."""
    score: str | None = None
    """Score that the verdict compares (None: the score of the run)."""
    level: float | None = None
    """Significance level (None: the level of the run)."""
    margin: float | None = None
    """Share of the proven gain below which differences count as none (None: the margin of the run)."""
    labels: Path | None = None
    """File of trusted labels of the run's answers, which correct the judged scores (docs/judges.md)."""
    out: Path | None = None
    """Folder to write the report to.
    None: the run folder; with another score, level or margin, or labels, the folder ``reports/SCORE...`` in it."""


def demo(arguments: Sequence[str]) -> int:
    """Parse ``locaudit demo [--positive] [flags]``, run it and return the exit code."""
    name = "positive" if _POSITIVE in arguments else "demo"
    rest = [argument for argument in arguments if argument != _POSITIVE]
    command = parse(_Run(load_preset(name), Path("runs") / name), f"locaudit demo [{_POSITIVE}]", _DEMO, rest)
    code = _run(command)
    if command.repeats == 1 and not (command.dry_run or command.config.evaluation.max_new_tokens):
        _show_sample(command.out)
    return code


def _show_sample(folder: Path) -> None:
    """Print one sampled answer with and without the edit at the claim."""
    from locaudit.run.example import sample_answers
    from locaudit.store.run import load_run
    from locaudit.text import readable

    try:
        question, said = sample_answers(folder, f"claim/{load_run(folder).verdict.main}")
    except RunFolderError:  # no edit there, because all diverged
        return
    say("\nOne sampled answer to the first test prompt, an illustration that enters no score:", style="bold")
    say(f"{readable(question)} ...")
    width = max(map(len, said))
    for who, text in said.items():
        say(f"  {who:{width}}  ... {readable(text) or '(nothing)'}")


def audit(arguments: Sequence[str]) -> int:
    """Parse ``locaudit audit [CONFIG.yaml] [flags]``, run it and return the exit code."""
    base, rest = take_config(AuditConfig(), arguments)
    words = "Audit a localization claim. Flags override the settings in CONFIG.yaml, if you give one."
    return _run(parse(_Run(base), "locaudit audit [CONFIG.yaml]", words, rest))


def report(arguments: Sequence[str]) -> None:
    """Parse ``locaudit report DIR [flags]`` and write the report. No model is loaded."""
    words = "Write the report of a finished run again, or with another score, level or margin. No model is loaded."
    command = read_flags(_Report, "locaudit report", words, arguments)
    settings = {"score": command.score, "level": command.level, "margin": command.margin}
    from locaudit.cli.paper import print_study
    from locaudit.cli.shown import print_repeats, print_verdict
    from locaudit.report.result import read_result
    from locaudit.store.repeats import is_repeats
    from locaudit.studies.paper import is_study, write_paper

    if is_study(command.folder):
        if command.out is not None or any(value is not None for value in (*settings.values(), command.labels)):
            raise ConfigError(
                got=f"--score, --level, --margin, --labels or --out with {command.folder}, a study of several audits",
                expected="these flags only for a single run or for repeats",
                remedy=f"give the folder of one audit: locaudit report {command.folder / 'sets'} --score mc1",
            )
        print_study(write_paper(command.folder))
    elif is_repeats(command.folder):
        _refuse_labels(command.labels, command.folder / "repeat-0")
        print_repeats(command.folder, command.out, **settings)
    else:
        print_verdict(read_result(command.folder, **settings, labels=command.labels), command.out)


def _run(command: _Run) -> int:
    inputs = refuse_early(command.config, command.out, command.repeats)
    from locaudit.cli.shown import count_unjudged, print_repeats, print_verdict
    from locaudit.report import require_report_extra
    from locaudit.report.design import power_sentence
    from locaudit.report.result import read_result
    from locaudit.run.audit import run_audit
    from locaudit.run.judging import choose_judges
    from locaudit.run.pilot import describe_estimate, run_pilot
    from locaudit.run.repeats import repeat_config, run_repeats
    from locaudit.run.subject import few_for_no
    from locaudit.store.repeats import repeat_folder
    from locaudit.store.run import load_run
    from locaudit.store.trusted import read_labels

    require_report_extra()
    if command.labels is not None:
        generates = inputs.config.evaluation.max_new_tokens != 0
        read_labels(
            command.labels, tuple(choose_judges(inputs.config.judges, inputs.behaviour.aspects, generates=generates))
        )
    if command.repeats > 1:
        _refuse_labels(command.labels, repeat_folder(command.out, 0))
    if few := few_for_no(inputs.behaviour, inputs.config.split):
        say(f"locaudit: {few}", stderr=True)
    if command.dry_run:
        config, out = command.config, command.out
        if command.repeats > 1:
            config, out = repeat_config(config, 0), repeat_folder(out, 0)
        estimate = run_pilot(config, out)
        if command.repeats > 1:
            note = f"this is for one repeat; all take {command.repeats} times as long, but load the model only once"
            estimate = replace(estimate, notes=(*estimate.notes, note))
        say(describe_estimate(estimate))
        if seen := power_sentence(load_run(out), folder=str(out)):
            say(seen)
        return 0
    if command.repeats > 1:
        run_repeats(command.config, command.out, command.repeats)
        return count_unjudged(print_repeats(command.out).runs.values())
    run_audit(command.config, command.out)
    result = read_result(command.out)
    if command.labels is not None:
        result.write_report()  # the run's own; the one that is printed is written beside it
        result = read_result(command.out, labels=command.labels)
    print_verdict(result)
    return count_unjudged([result.run])


def _refuse_labels(labels: Path | None, folder: Path) -> None:
    """Labels are of one run's answers; `folder` is one of the repeats."""
    if labels is not None:
        raise ConfigError(
            got="--labels for several repeats",
            expected="labels of the answers of one run",
            remedy=f"run: locaudit report {folder} --labels {labels}",
        )


def refuse_early(config: AuditConfig, out: Path | None = None, repeats: int = 1, *, audits: bool = True) -> Inputs:
    """What an audit or, if `audits` is False, a ranking would read.

    Raises errors in settings and files at once, without the seconds that torch takes.
    """
    from locaudit.run.subject import read_settings
    from locaudit.store.folder import check_folder, check_run

    with warnings.catch_warnings(action="ignore"):  # the run reads them again and gives the same warnings
        inputs = read_settings(config, out=out, audits=audits)
    if out is not None and repeats != 1:
        from locaudit.run.repeats import check_repeats

        check_repeats(inputs.config, out, repeats, inputs.registration)
    elif out is not None:
        check_folder(out)
        check_run(out, inputs.config, inputs.registration)
    return inputs
