"""Statistics of an audit: scores, selection on validation, tests, intervals, verdict."""

from locaudit.stats.judged import count_missing, judged_records, resolve_score, run_score
from locaudit.stats.matching import Match, compare_edits, holm, rank_correlation
from locaudit.stats.scores import JUDGED, components, judged_metrics, mean_score, score_values
from locaudit.stats.selection import select
from locaudit.stats.tests import (
    monte_carlo_p,
    normal_tail_p,
    paired_gain_p,
    paired_interval,
    score_interval,
    t_test_p,
)
from locaudit.stats.verdict import MethodVerdict, Outcome, Verdict, decide

__all__ = [
    "JUDGED",
    "Match",
    "MethodVerdict",
    "Outcome",
    "Verdict",
    "compare_edits",
    "components",
    "count_missing",
    "decide",
    "holm",
    "judged_metrics",
    "judged_records",
    "mean_score",
    "monte_carlo_p",
    "normal_tail_p",
    "paired_gain_p",
    "paired_interval",
    "rank_correlation",
    "resolve_score",
    "run_score",
    "score_interval",
    "score_values",
    "select",
    "t_test_p",
]
