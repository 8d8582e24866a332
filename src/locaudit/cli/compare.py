"""``locaudit compare``: put audits of other models, claims or behaviours side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from locaudit.cli.commands import read_flags, say

if TYPE_CHECKING:
    from locaudit.report.compare import Comparison


@dataclass(frozen=True)
class _Compare:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, two or more."""
    out: Path = Path("runs/compare")
    """Folder to write compare.html and compare.csv to."""
    score: str | None = None
    """Score that all verdicts compare (None: each run's own)."""
    level: float | None = None
    """Significance level of all verdicts (None: that of the runs)."""
    margin: float | None = None
    """Share of the proven gain below which differences count as none (None: each run's own)."""


def compare(arguments: list[str]) -> None:
    """Parse ``locaudit compare RUN...`` and write the comparison. No model is loaded."""
    words = "Put finished audits side by side: outcomes, answers, leads, and p corrected for their number."
    command = read_flags(_Compare, "locaudit compare", words, arguments)
    from locaudit.report.compare import write_comparison

    settings = {"score": command.score, "level": command.level, "margin": command.margin}
    page, found = write_comparison(command.runs, command.out, **settings)
    print_comparison(page, found)


def print_comparison(page: Path, found: Comparison) -> None:
    """Print a line for each audit, and where the page is."""
    width = max(map(len, found.runs))
    for name, v in found.verdicts.items():
        p, p_holm = found.p_values[name]
        answers = "  ".join(f"{q.asked} {q.answer}" for q in v.questions if q.name != "moves")
        low, high = v.first.lead_interval
        lead = f"{v.first.n_at_least} of {v.first.n_used} as good, lead {v.first.lead:+.3g} ({low:.3g} to {high:.3g})"
        say(f"{name:{width}}  {v.outcome:22}  {lead}  largest p = {p:.3f} (Holm {p_holm:.3f})  {answers}")
    say(f"\n{found.multiplicity}")
    say(f"\ncomparison: {page}")
