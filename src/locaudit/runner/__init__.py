"""Running an audit: plan, shared preparation, trials, judging, resumption."""

from locaudit.runner.comparing import compare_judges
from locaudit.runner.estimate import Estimate, describe_estimate, estimate_audit
from locaudit.runner.run import run_audit, run_probes

__all__ = ["Estimate", "compare_judges", "describe_estimate", "estimate_audit", "run_audit", "run_probes"]
