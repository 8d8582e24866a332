"""Which figures a report has, and the words under each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from locaudit.records import TrialRecord
from locaudit.report import view
from locaudit.report.figures import draw_controls, draw_probes
from locaudit.report.html import Drawing
from locaudit.report.scatter import Point, draw_effect, draw_truth_info
from locaudit.report.style import save, score_phrase, score_title
from locaudit.stats import JUDGED, Verdict

NAMES = ("controls", "effect_vs_kl", "truth_info", "kl_mc", "probes")
"""Figures that a report may have, in the page's order."""


def draw_all(
    folder: Path,
    verdict: Verdict,
    records: Sequence[TrialRecord],
    probes: Mapping[str, Any] | None,
    heads: Sequence[tuple[int, int]],
) -> list[Drawing]:
    """Draw what there is data for into `folder`, as PNG and SVG; `heads` are the claimed (layer, head) pairs.

    A figure of an earlier report for which there is no data any more, such as one of judges since removed, is deleted.
    """
    drawings = []
    chosen = view.chosen_ids(records, verdict.score)
    base = view.base_record(records).metrics["test"]
    if any(map(math.isfinite, (x for v in verdict.methods.values() for x in (v.base, v.claim, *v.controls)))):
        svg = save(draw_controls(verdict.methods, verdict.score), folder, "controls")
        drawings.append(Drawing("controls", svg, *_controls_words(verdict)))
    points = view.effect_points(records, verdict.score, chosen)
    if points:
        svg = save(draw_effect(points, verdict.score), folder, "effect_vs_kl")
        drawings.append(Drawing("effect_vs_kl", svg, *_effect_words(verdict, points)))
    points = view.truth_info_points(records, chosen)
    if points and all(math.isfinite(base[aspect]) for aspect in ("truth", "info")):
        svg = save(draw_truth_info(points, (base["info"], base["truth"])), folder, "truth_info")
        drawings.append(Drawing("truth_info", svg, *_truth_info_words(verdict, points, base)))
    points = view.effect_points(records, "mc2", chosen) if verdict.score in JUDGED and "mc2" in base else []
    if points:
        svg = save(draw_effect(points, "mc2"), folder, "kl_mc")
        drawings.append(Drawing("kl_mc", svg, *_multiple_choice_words(verdict, points)))
    if probes and probes.get("val_accuracy"):
        svg = save(draw_probes(probes["val_accuracy"], probes.get("majority"), heads), folder, "probes")
        drawings.append(Drawing("probes", svg, *_probe_words(probes, heads)))
    for name in set(NAMES) - {drawing.name for drawing in drawings}:
        for ending in ("png", "svg"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    return drawings


def _controls_words(verdict: Verdict) -> tuple[str, str]:
    phrase = score_phrase(verdict.score)
    caption = (
        f"{phrase[0].upper()}{phrase[1:]} over the {verdict.n_questions} test questions. Histogram and dots: the edit "
        "at each random control location. Lines: the same edit at the claim and of the whole model, and the unedited "
        "model. p is the share of the claim and its controls that score at least as well as the claim."
    )
    alt = "Control scores of each method. " + " ".join(
        f"{method}: claim {v.claim:.3f}, {v.n_at_least} of {len(v.controls)} controls at or above it, "
        f"p = {v.p_value:.3f}."
        for method, v in verdict.methods.items()
    )
    return caption, alt


def _effect_words(verdict: Verdict, points: Sequence[Point]) -> tuple[str, str]:
    caption = (
        f"What each edit gains and what it costs: change of the {_on_test(verdict.score)} (n = {verdict.n_questions} "
        "questions) against the mean KL divergence of the edited from the unedited model on the fixed documents. "
        f"{len(points)} trials; the {_filled(points)} filled ones were chosen on validation questions and alone enter "
        "the verdict. The dotted line is the unedited model."
    )
    title = score_title(verdict.score)
    return caption, f"Scatter plot of {len(points)} edits: effect on test {title} against KL drift."


def _truth_info_words(verdict: Verdict, points: Sequence[Point], base: Mapping[str, float]) -> tuple[str, str]:
    caption = (
        f"What an edit makes of the answers: the share judged true (Truth) against the share judged informative "
        f"(Info), of the answers to the test questions (n = {verdict.n_questions}). {len(points)} trials; the "
        f"{_filled(points)} filled ones were chosen on validation questions. The dotted lines cross at the unedited "
        f"model (Info {base['info']:.3f}, Truth {base['truth']:.3f}); above the curve, Info*Truth is higher "
        "than the unedited model’s. Edits with the same shares lie on one another."
    )
    return caption, f"Scatter plot of {len(points)} edits: Truth against Info on test."


def _multiple_choice_words(verdict: Verdict, points: Sequence[Point]) -> tuple[str, str]:
    caption = (
        f"Multiple choice instead of generated answers: change of the {_on_test('mc2')} (n = {verdict.n_questions} "
        "questions) against the mean KL divergence of the edited from the unedited model on the fixed documents. "
        f"{len(points)} trials; the {_filled(points)} filled ones were chosen by {score_title(verdict.score)} on "
        "validation questions. MC2 does not enter the verdict. The dotted line is the unedited model."
    )
    return caption, f"Scatter plot of {len(points)} edits: effect on test MC2 against KL drift."


def _on_test(score: str) -> str:
    """The score with its split: ``mean test MC2``, ``test Info*Truth``."""
    return score_phrase(score).replace(score_title(score), f"test {score_title(score)}")


def _filled(points: Sequence[Point]) -> int:
    return sum(point.chosen for point in points)


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
