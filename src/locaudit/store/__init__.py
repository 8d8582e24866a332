"""The run folder: configuration, records in SQLite (one transaction a trial), edits, and shared preparation.

config.yaml      the configuration, every default spelled out
trials.sqlite    records, per-question scores, answers and their judgements, timings, facts of the run
edits/           one safetensors file a trial
cache/           what all trials share (activations' statistics, reference log-probabilities, drift text)
verdict.json, report.html, figures/
"""

from locaudit.store.database import HeldOutQuestion, Store
from locaudit.store.files import MIN_FREE_BYTES, no_room, write_atomically
from locaudit.store.folder import check_folder, check_run, open_run, read_run, registration_hash

__all__ = [
    "MIN_FREE_BYTES",
    "HeldOutQuestion",
    "Store",
    "check_folder",
    "check_run",
    "no_room",
    "open_run",
    "read_run",
    "registration_hash",
    "write_atomically",
]
