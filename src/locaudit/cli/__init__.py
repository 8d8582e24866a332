"""The command line, ``locaudit COMMAND``. No logic, only words in and out."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from locaudit.cli.calibrate import calibrate
from locaudit.cli.judge import judge
from locaudit.cli.paper import paper, print_study
from locaudit.config import AuditConfig, load_config, load_preset
from locaudit.errors import LocauditError

if TYPE_CHECKING:
    from locaudit.report.view import Registered

_PROGRAM = """Does editing give evidence for localization?

commands:
  locaudit demo [flags]                  a real audit of SmolLM2-135M in minutes
  locaudit audit [CONFIG.yaml] [flags]   audit a claim; run it again to resume
  locaudit paper [CONFIG.yaml] [flags]   every experiment and figure of the paper, on your model and data
  locaudit probe [CONFIG.yaml] [flags]   probe every head and print the best ones
  locaudit report DIR                    write the report of a run folder, or of a study, again
  locaudit judge fit|validate|compare    judges of generated answers
  locaudit calibrate null|run|planted    error rates and power of the verdict

Each command has its own --help."""


_SHOWN_QUESTIONS = 3
"""Test questions whose answers are printed."""


@dataclass(frozen=True)
class _Run:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    out: Path = Path("runs/audit")
    """Run folder: records, edits, verdict and report. Naming an earlier one with the same settings resumes it."""
    repeats: int = 1
    """Audits with other training seeds and question splits, each in its folder ``repeat-N``: one verdict over all."""
    dry_run: bool = False
    """Say which trials there would be and about how long they would take here, timed on small samples of them. Writes
    nothing."""


@dataclass(frozen=True)
class _Probe:
    config: Annotated[AuditConfig, tyro.conf.arg(name="")] = field(default_factory=AuditConfig)
    top: int = 16
    """Heads to print."""


@dataclass(frozen=True)
class _Report:
    folder: tyro.conf.Positional[Path]
    """Run folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0, or 2 for bad input, 130 when interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {"demo": _demo, "audit": _audit, "paper": paper, "probe": _probe, "report": _report}
    commands |= {"judge": judge, "calibrate": calibrate}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_PROGRAM)
        return 0
    if arguments[0] in ("--version", "-V"):
        from importlib import metadata

        print(f"locaudit {metadata.version('locaudit')}")
        return 0
    try:
        if arguments[0] not in commands:
            from locaudit.errors import ConfigError

            raise ConfigError(
                got=f"the command {arguments[0]!r}",
                expected=f"one of {', '.join(commands)}",
                remedy="see locaudit --help",
            )
        _quiet_libraries()
        with warnings.catch_warnings():
            warnings.showwarning = _show_note
            commands[arguments[0]](arguments[1:])
    except LocauditError as error:
        print(f"locaudit: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(
            f"locaudit: got {error.strerror or error} at {error.filename or 'a file'}; expected to read or write it; "
            "check room, permissions and what is at that path, then repeat the command: finished trials are kept",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("locaudit: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _demo(arguments: list[str]) -> None:
    command = tyro.cli(
        _Run,
        prog="locaudit demo",
        description="Audit SmolLM2-135M on bundled questions: top-8 probed heads against 19 random sets.",
        args=arguments,
        default=_Run(load_preset("demo"), Path("runs/demo")),
    )
    _run(command)


def _audit(arguments: list[str]) -> None:
    base, rest = _take_config(arguments)
    command = tyro.cli(
        _Run,
        prog="locaudit audit [CONFIG.yaml]",
        description="Audit a localization claim. Settings come from CONFIG.yaml, if given, and flags go over it.",
        args=rest,
        default=_Run(base),
    )
    _run(command)


def _probe(arguments: list[str]) -> None:
    base, rest = _take_config(arguments)
    command = tyro.cli(
        _Probe,
        prog="locaudit probe [CONFIG.yaml]",
        description="Probe every head on the training questions and print the best ones.",
        args=rest,
        default=_Probe(base),
    )
    from locaudit.run.audit import run_probes

    probes = run_probes(command.config)
    location = probes.top(command.top)
    console = Console(highlight=False)
    n_train, n_val = probes.n_train, probes.n_val
    console.print(
        f"validation accuracy ({n_train} training and {n_val} validation examples, majority {probes.majority:.3f})"
    )
    for layer, head in probes.ranking()[: command.top]:
        console.print(f"  {layer}.{head}\t{probes.val_accuracy[layer, head].item():.3f}")
    console.print(f'--claim "{location}"')


def _report(arguments: list[str]) -> None:
    command = tyro.cli(_Report, prog="locaudit report", description="Write a run folder's report.", args=arguments)
    from locaudit.report import write_report
    from locaudit.report.repeats import is_repeats
    from locaudit.studies.paper import is_study, write_paper

    if is_study(command.folder):
        print_study(write_paper(command.folder))
        return
    if is_repeats(command.folder):
        _print_repeats(command.folder)
        return
    _print_verdict(command.folder, write_report(command.folder))


def _run(command: _Run) -> None:
    from locaudit.report import require_report_extra, write_report
    from locaudit.run.audit import run_audit
    from locaudit.run.estimate import describe_estimate, estimate_audit
    from locaudit.run.repeats import check_repeats, run_repeats

    require_report_extra()
    if command.repeats != 1:
        check_repeats(command.config, command.repeats)
    if command.dry_run:
        several = command.repeats > 1
        estimate = estimate_audit(command.config, out=None if several else command.out)
        if several:
            note = f"one repeat: all of them take {command.repeats} times as long, less the time of loading the model"
            estimate = replace(estimate, notes=(*estimate.notes, note))
        print(describe_estimate(estimate))
        return
    if command.repeats > 1:
        run_repeats(command.config, command.out, command.repeats)
        _print_repeats(command.out)
        return
    run_audit(command.config, command.out)
    _print_verdict(command.out, write_report(command.out))


def _print_repeats(folder: Path) -> None:
    from locaudit.report.repeats import write_repeats

    page, found = write_repeats(folder)
    console = Console(highlight=False, soft_wrap=True)
    for part in found.unfinished:
        console.print(f"UNFINISHED: {part}; all below is provisional", style="bold red", markup=False)
    if found.raised:
        console.print(f"REPEATS WERE ADDED: {found.raised}", style="bold red", markup=False)
    _print_changes(console, found.registered)
    console.print(str(found.verdict), markup=False)
    _print_unchanged(console, found.registered)
    console.print(f"\nreport: {page} (and one in each repeat's folder)", markup=False)


def _print_changes(console: Console, claim_file: Registered | None) -> None:
    if claim_file is not None and claim_file.changed:
        console.print(
            f"CHANGED AFTER REGISTRATION ({claim_file.hash}, {claim_file.file}): {'; '.join(claim_file.changed)}",
            style="bold red",
            markup=False,
        )


def _print_unchanged(console: Console, claim_file: Registered | None) -> None:
    if claim_file is not None and not claim_file.changed:
        console.print(
            f"\nregistered before the run: {claim_file.hash}, {claim_file.file}; nothing was changed after",
            markup=False,
        )


def _print_verdict(folder: Path, report: Path) -> None:
    from locaudit.report.answers import conversations
    from locaudit.report.view import registered
    from locaudit.stats import conclusion, decide_run, judged_records
    from locaudit.store import read_run

    with read_run(folder) as store:
        records, planned = judged_records(store), (store.fact("run") or {}).get("planned", 0)
        verdict = decide_run(store, records)
        judgements = {
            slot: store.judgements(judge["fingerprint"]) for slot, judge in (store.fact("judges") or {}).items()
        }
        said = conversations(store.questions("test"), records, verdict, judgements)[:_SHOWN_QUESTIONS]
        claim_file = registered(store.fact("registration"), store.config, verdict.score)
    console = Console(highlight=False, soft_wrap=True)
    if len(records) < planned:
        console.print(f"UNFINISHED: {len(records)} of {planned} trials; all below is provisional.", style="bold red")
    _print_changes(console, claim_file)
    console.print(verdict.headline, style="bold", markup=False)
    for name, result in verdict.methods.items():
        console.print(f"\n{name}: {result.outcome}", style="bold", markup=False)
        console.print(result.sentence, markup=False)
        for grade in result.grades:
            console.print(f"  {grade.question}: {grade.answer}; {grade.evidence}.", markup=False)
        if result.grades:
            console.print(conclusion(result.grades), markup=False)
    _print_unchanged(console, claim_file)
    if said:
        console.print("\nWhat the models say (the first test questions; more in the report):", style="bold")
    for conversation in said:
        console.print(f"\nQ: {conversation.question}", markup=False)
        width = max(len(answer.who) for answer in conversation.answers)
        for answer in conversation.answers:
            text = "(diverged)" if answer.answer is None else answer.answer.replace("\n", " ") or "(nothing)"
            marks = ", ".join(
                f"{o.word} {'?' if o.probability is None else f'{o.probability:.2f}'}" for o in answer.opinions
            )
            console.print(f"  {answer.who:{width}}  {text}{f'  [{marks}]' if marks else ''}", markup=False)
    console.print(f"\nreport: {report}", markup=False)


def _take_config(arguments: list[str]) -> tuple[AuditConfig, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return load_config(arguments[0]), arguments[1:]
    return AuditConfig(), arguments


def _show_note(message: Warning | str, *_args: Any, **_keywords: Any) -> None:
    print(f"locaudit: note: {message}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and advice out of ours."""
    settings: dict[str, Any] = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
