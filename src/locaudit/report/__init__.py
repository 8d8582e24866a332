"""The report of a run folder: verdict, trials, figures and one HTML page, from records and statistics alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from locaudit.records import json_text
from locaudit.report import view
from locaudit.report.answers import conversations
from locaudit.report.drawings import draw_all
from locaudit.report.html import render_page
from locaudit.report.intervals import score_intervals
from locaudit.report.judged import judged_scores, judged_table
from locaudit.report.style import require
from locaudit.report.trials import trials_csv
from locaudit.stats import decide_run, judged_records, run_score
from locaudit.store import read_run, write_atomically

__all__ = ["require_report_extra", "write_report"]


def require_report_extra() -> None:
    """Raise `LocauditError` now, not after hours of trials, when the extra `report` is not installed."""
    for module in ("matplotlib", "jinja2"):
        require(module)


def write_report(folder: str | Path) -> Path:
    """Judge the records of a run folder; write verdict.json, trials.csv, figures/, report.html; returns its path.

    Works on an unfinished run: the page then says first what is missing. Raises `RunFolderError` for a folder that is
    no run or has no scores of the unedited model, `LocauditError` without the extra `report` (verdict.json and
    trials.csv are there even then).
    """
    with read_run(folder) as store:
        records, config, seconds, score = judged_records(store), store.config, store.seconds(), run_score(store)
        run, probes, judges = store.fact("run") or {}, store.fact("probes"), store.fact("judges") or {}
        questions = store.questions("test")
        judgements = {aspect: store.judgements(judge["fingerprint"]) for aspect, judge in judges.items()}
        verdict = decide_run(store, records)
        registered = view.registered(store.fact("registration"), config, score)
    folder = Path(folder)
    summary = {**asdict(verdict), "judges": judges}
    if registered is not None:
        summary["registration"] = {key: value for key, value in asdict(registered).items() if key != "text"}
    write_atomically(folder / "verdict.json", json_text(summary).encode())
    intervals = score_intervals(records, judged_scores(records))
    write_atomically(folder / "trials.csv", trials_csv(records, score, seconds, intervals).encode())
    heads = view.claimed_heads(run.get("claim") or verdict.claim)
    page = render_page(
        verdict,
        records,
        config,
        run=run,
        seconds=seconds,
        drawings=draw_all(folder / "figures", verdict, records, probes, heads),
        judged=judged_table(records, verdict, {aspect: judge["name"] for aspect, judge in judges.items()}, intervals),
        answers=conversations(questions, records, verdict, judgements),
        registered=registered,
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path
