"""Print verdicts."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from locaudit.cli.commands import say
from locaudit.records import NO_METHOD
from locaudit.report.repeats import Repeats, write_repeats
from locaudit.report.result import AuditResult
from locaudit.report.style import aspect_words
from locaudit.report.tables import Registered, reading_words
from locaudit.stats.verdict import WIDTH
from locaudit.store.run import Run
from locaudit.store.trusted import Corrected
from locaudit.text import LONGEST, readable

N_SHOWN = 3
"""Number of questions whose answers are printed."""


def count_unjudged(runs: Iterable[Run]) -> int:
    """Print which runs have no verdict because judgements are missing. Returns the exit code: 1 if any, else 0."""
    lacking = [(run.folder, aspect, *counts) for run in runs for aspect, counts in run.lacking.items()]
    for folder, aspect, n, of, reason in lacking:
        print(
            f"locaudit: {n} of {of} answers in {folder} have no judgement of {aspect} (first: {readable(reason)}); "
            "trials and answers are kept: check the judge, then repeat the command to get only the missing judgements",
            file=sys.stderr,
        )
    return int(bool(lacking))


def print_repeats(folder: Path, out: Path | None = None, **settings: Any) -> Repeats:
    """Write the report of an audit's repeats, and print their common verdict. Arguments as in `write_repeats`."""
    page, found = write_repeats(folder, out, **settings)
    for part in found.unfinished:
        say(f"UNFINISHED: {part}; all below is provisional", style="bold red")
    if found.raised:
        say(f"REPEATS WERE ADDED: {found.raised}", style="bold red")
    for part in found.extended:
        say(part, style="bold red")
    _print_changes(found.registered, found.reading)
    say(str(found.verdict))
    _print_unchanged(found.registered)
    say(f"\nreport: {page} (and one in each repeat's folder)")
    return found


def _print_changes(claim_file: Registered | None, reading: Mapping[str, tuple[Any, Any]]) -> None:
    if reading:
        say(f"READ WITH OTHER SETTINGS: {reading_words(reading)}", style="bold red")
    if claim_file is not None and claim_file.changed:
        say(
            f"CHANGED AFTER REGISTRATION ({claim_file.hash}, {claim_file.file}): {'; '.join(claim_file.changed)}",
            style="bold red",
        )


def _print_unchanged(claim_file: Registered | None) -> None:
    if claim_file is not None and not claim_file.changed:
        say(f"\nregistered before the run: {claim_file.hash}, {claim_file.file}; nothing was changed after")


def _print_corrected(found: Corrected) -> None:
    say(f"\nCorrected by {found.n_labels} labels ({found.file}), {found.how}:", style="bold")
    for aspect, a in found.agreement.items():
        say(f"  judge and labels agree on {a.agreement:.1%} of {a.n} answers ({aspect}; kappa {a.kappa:.2f})")
    for line in found.lines:
        name = f"{line.score}, {line.what}" if line.method == NO_METHOD else f"{line.score}, {line.method}: {line.what}"
        (low, high), (least, most), c = line.judged_interval, line.corrected.interval, line.corrected
        by_labels = f"{c.value:.3f} ({least:.3f} to {most:.3f})" if c.n >= found.least else "too few labels"
        by_labels = by_labels if c.se == c.se or c.n < found.least else f"{c.value:.3f} (all equal: no interval)"
        say(f"  {name:32}  judge {line.judged:.3f} ({low:.3f} to {high:.3f}); labels of {c.n} questions: {by_labels}")


def print_verdict(result: AuditResult, out: Path | None = None) -> None:
    """Write the report of a run, to `out` if given, and print its verdict."""
    report, tables = result.write_report(out), result.tables
    verdict, planned = tables.verdict, tables.manifest.planned
    if len(tables.rows) < planned:
        say(f"UNFINISHED: {len(tables.rows)} of {planned} trials; all below is provisional.", style="bold red")
    _print_changes(tables.registered, tables.reading)
    if verdict.extended:
        say(verdict.extended, style="bold red")
    for note in filter(None, (tables.manifest.moved, *tables.manifest.notes, *verdict.notes)):
        say(f"Note: {note}")
    say(f"\n{verdict.subject}\n")
    say(verdict.headline, style="bold")
    say(f"\n{verdict.table(shutil.get_terminal_size((WIDTH, 24)).columns)}\n")
    for remark in verdict.remarks():
        say(remark)
    for o in verdict.off_target:
        (low, high), among = o.gain_interval, f" {o.among}" if o.among else ""
        say(
            f"\nOff target, {o.behaviour}, {o.method}: {o.score} {o.base:.3f} unedited, {o.claim:.3f} at the claim "
            f"({o.gain:+.3f}, {low:+.3f} to {high:+.3f}); {o.n_at_least} of {len(o.controls)} controls{among} at or "
            "above it"
        )
    if tables.corrected is not None:
        _print_corrected(tables.corrected)
    _print_unchanged(tables.registered)
    if tables.said:
        say("\nWhat the models say (the first test questions; more in the report):", style="bold")
    width = max(map(len, tables.said), default=0)
    for i, question in enumerate(tables.questions[: N_SHOWN if tables.said else 0]):
        say(f"\nQ: {readable(question.text, LONGEST)}")
        for who, speech in tables.said.items():
            text = "(diverged)" if speech is None else speech.answers[i].replace("\n", " ") or "(nothing)"
            judged = {} if speech is None else {aspect_words(name)[1]: p[i] for name, p in speech.judged.items()}
            marks = ", ".join(f"{word} {'?' if p is None else f'{p:.2f}'}" for word, p in judged.items())
            say(f"  {who:{width}}  {text}{f'  [{marks}]' if marks else ''}")
    say(f"\nreport: {report}")
