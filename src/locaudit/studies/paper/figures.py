"""The figures of a study: the paper's figures, under its file names, and our own. Captions are in `paper.html`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locaudit.report.figures import (
    HeatMap,
    Mark,
    Series,
    Spread,
    add_legend,
    draw_drift,
    draw_heads,
    draw_shares,
    draw_spreads,
    marker_key,
    new_figure,
)
from locaudit.report.html import plain
from locaudit.report.style import ARM_COLOURS, FAINT, INK, MIDDLE, PAPER, house_style, save, score_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Mapping[str, Any]
LOCALIZED, RANDOM, WHOLE = ARM_COLOURS["claim"], ARM_COLOURS["control"], ARM_COLOURS["whole"]
OUTCOMES = {"replicated": (WHOLE, "o"), "not replicated": (LOCALIZED, "X"), "could not test": (MIDDLE, "o")}
"""Colour and marker of each outcome."""
SINGLE, BEST = "#CC79A7", "#E69F00"
"""Two more colours of the Okabe-Ito palette."""


class Trials(NamedTuple):
    """The trials at one place, or at all random places, as one series of a scatter plot."""

    block: str
    """Key in numbers.json, such as ``iti``."""
    place: str
    """Key in that block, such as ``random``."""
    label: str
    """Legend text; ``{k}`` is replaced by the number of probed heads."""
    colour: str
    marker: str
    frontier: bool = False


SHARES, DRIFT = ("info", "truth"), ("kl", "mc2")
"""Metrics on the x and y axis."""
_ITI = (
    Trials("iti", "random", "random sets, ITI", RANDOM, "o"),
    Trials("iti", "localized", "probed heads, ITI", LOCALIZED, "D"),
)
_RANDOM = Trials("optimal", "random", "random sets, optimal", RANDOM, "o")
_PROBED = Trials("optimal", "localized", "probed heads, optimal", LOCALIZED, "D", frontier=True)
_WHOLE = Trials("optimal", "whole", "whole model, optimal", WHOLE, "s", frontier=True)
SCATTERS: Mapping[str, tuple[tuple[str, str], tuple[Trials, ...]]] = {
    "iti_truth_info": (SHARES, _ITI),
    "iti_kl_mc": (DRIFT, _ITI),
    "stronger_evidence_for_loc": (SHARES, (_ITI[1]._replace(colour=BEST, marker="o", frontier=True), _PROBED, _WHOLE)),
    "random_vs_top": (SHARES, (_RANDOM, _WHOLE, _PROBED)),
    "single_vs_top": (
        SHARES,
        (
            Trials("single", "random", "random single heads", SINGLE, "o"),
            Trials("single", "best_probed", "best probed head", BEST, "^"),
            _PROBED._replace(label="{k} probed heads"),
        ),
    ),
    "random_vs_top_MC_KL": (DRIFT, (_RANDOM, _PROBED._replace(frontier=False))),
}


def draw_study(n: Numbers, specification: Sequence[Numbers], folder: Path) -> dict[str, dict[str, str]]:
    """Draw the figures into `folder`, except those without any data. Returns name -> {"svg": text}."""
    accuracy, heads = n["setup"]["probes"]["val_accuracy"], [row["head"].split(".") for row in n["setup"]["localized"]]
    localized = [(int(layer), int(head)) for layer, head in heads]
    heat = HeatMap(accuracy, "validation accuracy")
    figures = {
        "specification": draw_specification(n["claims"], specification),
        "probes": draw_heads([heat], localized, floor=n["setup"]["probes"]["majority"]),
        "hist_ipo": _draw_sets(n, n["optimal"], "Optimal edit"),
    }
    if n["iti"]:
        figures["hist_iti"] = _draw_sets(n, n["iti"], "ITI")
    if n["single"]:
        figures |= {"hist_ipo_1": _draw_single(n), "probe_effect": draw_probe_effect(n)}
    for name, ((x, y), trials) in SCATTERS.items():
        series = [_series(n, one, x, y) for one in trials]
        if not all(n[one.block] for one in trials) or not any(one.points for one in series):
            continue
        titles, base = (score_title(x), score_title(y)), (n["base"][x], n["base"][y])
        if x == "kl":
            figures[name] = draw_drift(series, ylabel=f"{titles[1]} on test", base=base[1])
        else:
            figures[name] = draw_shares(series, titles=titles, base=base, product="Info*Truth")
    if n["landscape"]:
        effects = np.asarray(n["landscape"]["judged"]["effects"], dtype=float)
        reach = max(float(np.nanmax(np.abs(effects))), 1e-6)
        gained = HeatMap(effects, "Info*Truth gained", {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach})
        figures["landscape"] = draw_heads([HeatMap(accuracy, "probe accuracy"), gained], localized)
    return {name: {"svg": save(figure, folder, name, pdf=True)} for name, figure in figures.items()}


def draw_specification(claims: Sequence[Numbers], rows: Sequence[Numbers]) -> Figure:
    """What becomes of each claim if one choice is changed, and in how many of all combinations it is decided.

    Each row is a claim. The first column has the choices that decide, without the correction over claims; each further
    column changes one of them. At the right is the number of combinations of all choices with each outcome.
    """
    names = [claim["name"] for claim in claims]
    single = {(row["claim"], _option(row)): row["outcome"] for row in rows if row["changed"] is not None}
    columns = list(dict.fromkeys(option for _, option in single))
    with house_style():
        figure = new_figure(2.2 + 0.22 * len(names))
        axis = figure.subplots()
        for (claim, option), outcome in single.items():
            colour, marker = OUTCOMES[outcome]
            fill = "none" if outcome == "could not test" else colour
            at = columns.index(option), names.index(claim)
            axis.scatter(*at, marker=marker, s=44, linewidths=1.1, c=fill, edgecolors=colour)
        for y, name in enumerate(names):
            found = [row["outcome"] for row in rows if row["claim"] == name]
            counts = " / ".join(str(found.count(outcome)) for outcome in OUTCOMES)
            axis.text(len(columns) - 0.2, y, counts, va="center", fontsize=7)
        axis.text(len(columns) - 0.2, -1, "of all combinations", va="center", fontsize=7)
        axis.set_xticks(range(len(columns)), columns, rotation=55, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axis.set(xlim=(-0.6, len(columns) + 2.6), ylim=(len(names) - 0.4, -1.6))
        axis.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)
        fills = ("full", "full", "none")
        keys = zip(OUTCOMES.items(), fills, strict=True)
        add_legend(figure, [marker_key(name, *look, fillstyle=fill) for (name, look), fill in keys])
    return figure


def _option(row: Numbers) -> str:
    """The column of a row that changes one choice or none."""
    choice = row["changed"]
    if choice.endswith("score"):
        return score_title(row[choice])
    return f"{choice}: {row[choice]}" if choice else "as decided"


def _series(n: Numbers, trials: Trials, x: str, y: str) -> Series:
    found, points = (n[trials.block] or {}).get(trials.place, []), []
    for block in found if isinstance(found, list) else [found]:
        chosen = (block["chosen"] or {}).get("hyperparameter")
        points += [
            (trial[x], trial[y], trial["hyperparameter"] == chosen)
            for trial in block["trials"]
            if trial[x] is not None and trial[y] is not None
        ]
    label = trials.label.format(k=n["setup"]["n_localized"])
    return Series(label, trials.colour, trials.marker, points, trials.place != "random", trials.frontier)


def _draw_sets(n: Numbers, method: Numbers, title: str) -> Figure:
    """Distribution of scores over random sets, with lines for probed heads, whole model and unedited model."""
    marks = _marks(n, method["whole"]["score"], method["localized_score"])
    return _draw_spread(n, f"{title}, {method['n_random']} sets", method["random_scores"], marks, "random sets", RANDOM)


def _draw_single(n: Numbers) -> Figure:
    """Distribution of scores over random single heads, with the same lines and one for the best probed head."""
    single = n["single"]
    best = Mark("best probed head", single["best_probed"]["score"], BEST, "-.")
    marks = [*_marks(n, single["whole_score"], single["localized_score"]), best]
    scores, title = [row["score"] for row in single["random"]], f"Optimal edit, {single['n_random']} heads"
    return _draw_spread(n, title, scores, marks, "random single heads", SINGLE)


def _draw_spread(n: Numbers, title: str, scores: Any, marks: list[Mark], what: str, colour: str) -> Figure:
    spread = Spread(f"{title}, {n['setup']['n_questions']['test']} test questions", scores, marks)
    return draw_spreads([spread], xlabel=f"{score_title(n['setup']['score'])} on test", what=what, colour=colour)


def _marks(n: Numbers, whole: float | None, localized: float | None) -> list[Mark]:
    return [
        Mark("unedited model", n["base"][n["setup"]["score"]], INK, ":"),
        Mark("whole model", whole, WHOLE, "--"),
        Mark(f"{n['setup']['n_localized']} probed heads", localized, LOCALIZED, "-"),
    ]


def draw_probe_effect(n: Numbers) -> Figure:
    """Plot the effect of editing single heads against the accuracy of their probes."""
    with house_style():
        figure = new_figure(3.6)
        best = n["single"]["best_probed"]["head"]
        for axis, score in zip(figure.subplots(1, 2), ("judged", "mc2"), strict=True):
            found = n["probe_effect"][score]
            title = score_title(n["setup"]["score"] if score == "judged" else score)
            colours = [BEST if head == best else SINGLE for head in found["heads"]]
            axis.scatter(found["val_accuracy"], found["effects"], c=colours, s=34, edgecolors=PAPER, linewidths=0.7)
            axis.axhline(0, color=INK, linestyle=":", linewidth=1.2, zorder=1)
            axis.set(xlabel="probe accuracy on validation", ylabel=f"{title}, edited minus unedited")
            words = f"Spearman {plain(found['spearman'], '.2g')}, p = {plain(found['p'], '.2g')}"
            axis.set_title(f"{title}: {words}, n = {found['n']}", loc="left")
            axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        keys = (("random single heads", SINGLE), ("best probed head", BEST))
        add_legend(figure, [marker_key(label, colour, "o") for label, colour in keys])
    return figure
