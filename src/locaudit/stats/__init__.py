"""What the scores show: bootstrap, hypothesis tests, early stopping, grades and the verdict, from plain records."""

from locaudit.stats.agreement import Agreement, compare
from locaudit.stats.decide import decide
from locaudit.stats.equivalence import Match, compare_edits, differ_too_little
from locaudit.stats.grades import Grade, conclusion
from locaudit.stats.measured import Design
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.repeats import MethodRepeats, Repeat, RepeatsVerdict, combine_repeats
from locaudit.stats.resample import paired_interval, score_interval, score_intervals
from locaudit.stats.scores import (
    JUDGED,
    Score,
    add_judgements,
    components,
    count_missing,
    find_score,
    is_judged,
    judged_aspects,
    judged_metrics,
    judged_scores,
    mean_score,
    reaches,
    resolve_score,
    score_values,
)
from locaudit.stats.selection import Place, score_place, select
from locaudit.stats.sequential import Look, Monitor, controls_to_decide, look, share_interval
from locaudit.stats.tests import (
    holm,
    max_t_p,
    monte_carlo_p,
    normal_tail_p,
    paired_gain_p,
    rank_correlation,
    t_test_p,
)
from locaudit.stats.verdict import MethodVerdict, Outcome, Verdict

__all__ = [
    "JUDGED", "Agreement", "Design", "Grade", "Look", "Match", "MethodFacts", "MethodRepeats", "MethodVerdict",
    "Monitor", "Outcome", "Place", "Repeat", "RepeatsVerdict", "Score", "Verdict", "add_judgements",
    "combine_repeats", "compare", "compare_edits", "components", "conclusion", "controls_to_decide", "count_missing",
    "decide", "differ_too_little", "find_score", "holm", "is_judged",
    "judged_aspects", "judged_metrics", "judged_scores", "look", "max_t_p", "mean_score",
    "monte_carlo_p", "normal_tail_p", "paired_gain_p", "paired_interval", "rank_correlation", "reaches",
    "resolve_score", "score_interval", "score_intervals", "score_place",
    "score_values", "select", "share_interval", "t_test_p",
]  # fmt: skip
