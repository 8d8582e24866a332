"""What the scores show: intervals, hypothesis tests, early stopping and the verdict, from plain records."""

from locaudit.stats.agreement import Agreement, compare
from locaudit.stats.decide import decide
from locaudit.stats.intervals import Crossed, Estimate, Share, crossed_interval, estimate, score_intervals, true_share
from locaudit.stats.measured import Design
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.questions import Answer, Outcome, Question, find_outcome
from locaudit.stats.repeats import MethodRepeats, Repeat, RepeatsVerdict, combine_repeats
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
from locaudit.stats.sequential import Look, Monitor, look, share_interval
from locaudit.stats.tests import (
    Contrast,
    contrast_methods,
    gain_p,
    holm,
    max_t_p,
    monte_carlo_p,
    new_place_p,
    paired_gain_p,
    rank_correlation,
    t_test_p,
)
from locaudit.stats.verdict import MethodVerdict, NullResult, Verdict

__all__ = [
    "JUDGED", "Agreement", "Answer", "Contrast", "Crossed", "Design", "Estimate", "Look", "MethodFacts",
    "MethodRepeats", "MethodVerdict", "Monitor", "NullResult", "Outcome", "Place", "Question", "Repeat",
    "RepeatsVerdict", "Score", "Share", "Verdict", "add_judgements", "combine_repeats", "compare", "components",
    "contrast_methods", "count_missing", "crossed_interval", "decide", "estimate", "find_outcome", "find_score",
    "gain_p", "holm", "is_judged", "judged_aspects", "judged_metrics", "judged_scores", "look", "max_t_p", "mean_score",
    "monte_carlo_p", "new_place_p", "paired_gain_p", "rank_correlation", "reaches", "resolve_score", "score_intervals",
    "score_place", "score_values", "select", "share_interval", "t_test_p", "true_share",
]  # fmt: skip
