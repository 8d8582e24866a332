"""Running an audit: plan, shared preparation, trials, judging, resumption."""

from locaudit.runner.comparing import compare_judges
from locaudit.runner.run import run_audit, run_probes

__all__ = ["compare_judges", "run_audit", "run_probes"]
