"""Running an audit: plan, shared preparation, trials, resumption."""

from locaudit.runner.run import run_audit, run_probes

__all__ = ["run_audit", "run_probes"]
