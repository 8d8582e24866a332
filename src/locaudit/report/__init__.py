"""The report of a run folder: verdict.json, figures and one HTML page, from records and statistics alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locaudit.records import TrialRecord
from locaudit.report import view
from locaudit.report.figures import draw_controls, draw_effect, draw_probes
from locaudit.report.html import Drawing, render_page
from locaudit.report.style import require, save
from locaudit.stats import Verdict, decide, judged_records, run_score
from locaudit.store import read_run, write_atomically

__all__ = ["require_report_extra", "write_report"]


def require_report_extra() -> None:
    """Raise `LocauditError` now, not after hours of trials, when the extra `report` is not installed."""
    for module in ("matplotlib", "jinja2"):
        require(module)


def write_report(folder: str | Path) -> Path:
    """Judge the records of a run folder and write verdict.json, figures/ and report.html; returns the page's path.

    Works on an unfinished run: the page then says first what is missing. Raises `RunFolderError` for a folder that is
    no run or has no scores of the unedited model, `LocauditError` without the extra `report` (verdict.json is there
    even then).
    """
    with read_run(folder) as store:
        records, config, seconds, score = judged_records(store), store.config, store.seconds(), run_score(store)
        run, probes = store.fact("run") or {}, store.fact("probes")
    folder = Path(folder)
    verdict = decide(records, score=score, level=config.level)
    claim = run.get("claim") or verdict.claim
    write_atomically(folder / "verdict.json", verdict.to_json().encode())
    page = render_page(
        verdict,
        records,
        config,
        run=run,
        seconds=seconds,
        drawings=_draw(folder / "figures", verdict, records, probes, view.claimed_heads(claim)),
    )
    path = folder / "report.html"
    write_atomically(path, page.encode())
    return path


def _draw(
    folder: Path,
    verdict: Verdict,
    records: Sequence[TrialRecord],
    probes: Mapping[str, Any] | None,
    heads: Sequence[tuple[int, int]],
) -> list[Drawing]:
    """Draw what there is data for."""
    drawings = []
    if verdict.methods:
        svg = save(draw_controls(verdict.methods, verdict.score), folder, "controls")
        drawings.append(Drawing("controls", svg, *_controls_words(verdict)))
    points = view.effect_points(records, verdict.score)
    if points:
        svg = save(draw_effect(points, verdict.score), folder, "effect_vs_kl")
        filled = sum(point.chosen for point in points)
        drawings.append(
            Drawing(
                "effect_vs_kl",
                svg,
                f"What each edit gains and what it costs: change of the mean test {verdict.score} "
                f"(n = {verdict.n_questions} questions) against the mean KL divergence of the edited from the unedited "
                f"model on the fixed documents. {len(points)} trials; the {filled} filled ones were chosen on "
                "validation questions and alone enter the verdict. The dotted line is the unedited model.",
                f"Scatter plot of {len(points)} edits: effect on test {verdict.score} against KL drift.",
            )
        )
    if probes and probes.get("val_accuracy"):
        svg = save(draw_probes(probes["val_accuracy"], probes.get("majority"), heads), folder, "probes")
        drawings.append(Drawing("probes", svg, *_probe_words(probes, heads)))
    return drawings


def _controls_words(verdict: Verdict) -> tuple[str, str]:
    caption = (
        f"Mean {verdict.score} over the {verdict.n_questions} test questions. Histogram and dots: the edit at each "
        "random control location. Lines: the same edit at the claim and of the whole model, and the unedited model. "
        "p is the share of the claim and its controls that score at least as well as the claim."
    )
    alt = "Control scores of each method. " + " ".join(
        f"{method}: claim {v.claim:.3f}, {v.n_at_least} of {len(v.controls)} controls at or above it, "
        f"p = {v.p_value:.3f}."
        for method, v in verdict.methods.items()
    )
    return caption, alt


def _probe_words(probes: Mapping[str, Any], heads: Sequence[tuple[int, int]]) -> tuple[str, str]:
    n = f"{probes['n_val']} examples" if probes.get("n_val") else "examples"
    trained = f" (trained on {probes['n_train']})" if probes.get("n_train") else ""
    majority = probes.get("majority")
    floor = (
        "" if majority is None else f" Always naming the larger class gives {majority:.3f}, the pale line in the scale."
    )
    outline = f" Outlined: the claim’s {len(heads)} heads." if heads else ""
    caption = (
        f"Accuracy of a linear probe of true against false answers on each head’s output{trained}, on {n} held out "
        f"from the training questions.{floor}{outline} Probes rank heads; they do not enter the verdict."
    )
    best = max(max(row) for row in probes["val_accuracy"])
    return caption, f"Heat map of probe validation accuracy by layer and head; the highest is {best:.3f}."
