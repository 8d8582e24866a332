"""What a command prints of a verdict."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from locaudit.report import read_tables, write_report
from locaudit.report.repeats import write_repeats
from locaudit.report.tables import Registered
from locaudit.stats.grades import conclusion

_SHOWN_QUESTIONS = 3
"""Test questions whose answers are printed."""


def print_repeats(folder: Path) -> None:
    """The verdict over the repeats of an audit, whose report is written."""
    page, found = write_repeats(folder)
    console = Console(highlight=False, soft_wrap=True)
    for part in found.unfinished:
        console.print(f"UNFINISHED: {part}; all below is provisional", style="bold red", markup=False)
    if found.raised:
        console.print(f"REPEATS WERE ADDED: {found.raised}", style="bold red", markup=False)
    for part in found.extended:
        console.print(part, style="bold red", markup=False)
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


def print_verdict(folder: Path) -> None:
    """Write the report of a run folder, and say what it says."""
    tables = read_tables(folder)
    report = write_report(folder, tables)
    verdict, said, planned = tables.verdict, tables.conversations[:_SHOWN_QUESTIONS], tables.manifest.planned
    console = Console(highlight=False, soft_wrap=True)
    if len(tables.rows) < planned:
        console.print(
            f"UNFINISHED: {len(tables.rows)} of {planned} trials; all below is provisional.", style="bold red"
        )
    _print_changes(console, tables.registered)
    if verdict.extended:
        console.print(verdict.extended, style="bold red", markup=False)
    console.print(verdict.headline, style="bold", markup=False)
    for name, result in verdict.methods.items():
        console.print(f"\n{name}: {result.outcome}", style="bold", markup=False)
        console.print(result.sentence, markup=False)
        for grade in result.grades:
            console.print(f"  {grade.question}: {grade.answer}; {grade.evidence}.", markup=False)
        if result.grades:
            console.print(conclusion(result.grades), markup=False)
    _print_unchanged(console, tables.registered)
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
