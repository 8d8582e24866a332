"""Statistics of an audit: selection on validation, tests, intervals, verdict."""

from locaudit.stats.selection import select
from locaudit.stats.tests import monte_carlo_p, paired_gain_p, paired_interval
from locaudit.stats.verdict import MethodVerdict, Outcome, Verdict, decide

__all__ = [
    "MethodVerdict",
    "Outcome",
    "Verdict",
    "decide",
    "monte_carlo_p",
    "paired_gain_p",
    "paired_interval",
    "select",
]
