"""Running an audit: plan, shared preparation, trials, judging, resumption."""

from locaudit.runner.comparing import compare_judges
from locaudit.runner.estimate import Estimate, describe_estimate, estimate_audit
from locaudit.runner.paper import describe_plan, estimate_paper, run_paper
from locaudit.runner.run import run_audit, run_probes

__all__ = [
    "Estimate",
    "compare_judges",
    "describe_estimate",
    "describe_plan",
    "estimate_audit",
    "estimate_paper",
    "run_audit",
    "run_paper",
    "run_probes",
]
