"""Statistics of an audit: scores, selection on validation, tests, intervals, verdict."""

from locaudit.stats.grades import Grade, conclusion
from locaudit.stats.judged import count_missing, count_unjudged, judged_records, resolve_score, run_score
from locaudit.stats.matching import Match, compare_edits, differ_too_little, holm, max_t_p, rank_correlation
from locaudit.stats.measured import Design
from locaudit.stats.repeats import MethodRepeats, Repeat, RepeatsVerdict, combine_repeats
from locaudit.stats.run import decide_run, ended_early, read_repeat, run_design
from locaudit.stats.scores import JUDGED, components, judged_metrics, mean_score, reaches, score_values
from locaudit.stats.selection import select
from locaudit.stats.sequential import Look, controls_to_decide, look, share_interval
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
    "Design",
    "Grade",
    "Look",
    "Match",
    "MethodRepeats",
    "MethodVerdict",
    "Outcome",
    "Repeat",
    "RepeatsVerdict",
    "Verdict",
    "combine_repeats",
    "compare_edits",
    "components",
    "conclusion",
    "controls_to_decide",
    "count_missing",
    "count_unjudged",
    "decide",
    "decide_run",
    "differ_too_little",
    "ended_early",
    "holm",
    "judged_metrics",
    "judged_records",
    "look",
    "max_t_p",
    "mean_score",
    "monte_carlo_p",
    "normal_tail_p",
    "paired_gain_p",
    "paired_interval",
    "rank_correlation",
    "reaches",
    "read_repeat",
    "resolve_score",
    "run_design",
    "run_score",
    "score_interval",
    "score_values",
    "select",
    "share_interval",
    "t_test_p",
]
