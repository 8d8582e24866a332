"""The figures of a study: the paper's figures, under its file names, and our own. Captions are in `paper.html`."""

from __future__ import annotations

from collections.abc import Mapping
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
from locaudit.report.style import ARM_COLOURS, FAINT, INK, PAPER, house_style, save, score_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Mapping[str, Any]
LOCALIZED, RANDOM, WHOLE = ARM_COLOURS["claim"], ARM_COLOURS["control"], ARM_COLOURS["whole"]
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


def draw_study(n: Numbers, folder: Path) -> dict[str, dict[str, str]]:
    """Draw the figures into `folder`, except those without any data. Returns name -> {"svg": text}."""
    accuracy, heads = n["setup"]["probes"]["val_accuracy"], [row["head"].split(".") for row in n["setup"]["localized"]]
    localized = [(int(layer), int(head)) for layer, head in heads]
    heat = HeatMap(accuracy, "validation accuracy")
    figures = {
        "probes": draw_heads([heat], localized, floor=n["setup"]["probes"]["majority"]),
        "hist_iti": _draw_sets(n, n["iti"], "ITI"),
        "hist_ipo": _draw_sets(n, n["optimal"], "Optimal edit"),
        "hist_ipo_1": _draw_single(n),
        "probe_effect": draw_probe_effect(n),
    }
    for name, ((x, y), trials) in SCATTERS.items():
        series = [_series(n, one, x, y) for one in trials]
        if not any(one.points for one in series):
            continue
        titles, base = (score_title(x), score_title(y)), (n["base"][x], n["base"][y])
        if x == "kl":
            figures[name] = draw_drift(series, ylabel=f"{titles[1]} on test", base=base[1])
        else:
            figures[name] = draw_shares(series, titles=titles, base=base, product="Info*Truth")
    if n["landscape"]:
        effects = np.asarray(n["landscape"]["info_truth"]["effects"], dtype=float)
        reach = max(float(np.nanmax(np.abs(effects))), 1e-6)
        gained = HeatMap(effects, "Info*Truth gained", {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach})
        figures["landscape"] = draw_heads([HeatMap(accuracy, "probe accuracy"), gained], localized)
    return {name: {"svg": save(figure, folder, name, pdf=True)} for name, figure in figures.items()}


def _series(n: Numbers, trials: Trials, x: str, y: str) -> Series:
    found = n[trials.block][trials.place]
    points = []
    for block in found if trials.place == "random" else [found]:
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
    whole = (method["whole"]["chosen"] or {}).get("info_truth")
    spread = Spread(title, method["random_scores"], _marks(n, whole, method["localized_score"]))
    return draw_spreads([spread], xlabel="Info*Truth on test", what="random sets", colour=RANDOM)


def _draw_single(n: Numbers) -> Figure:
    """Distribution of scores over random single heads, with the same lines and one for the best probed head."""
    single = n["single"]
    best = Mark("best probed head", single["best_probed"]["score"], BEST, "-.")
    marks = [*_marks(n, single["whole_score"], single["localized_score"]), best]
    spread = Spread("Optimal edit", [row["score"] for row in single["random"]], marks)
    return draw_spreads([spread], xlabel="Info*Truth on test", what="random single heads", colour=SINGLE)


def _marks(n: Numbers, whole: float | None, localized: float | None) -> list[Mark]:
    return [
        Mark("unedited model", n["base"]["info_truth"], INK, ":"),
        Mark("whole model", whole, WHOLE, "--"),
        Mark(f"{n['setup']['n_localized']} probed heads", localized, LOCALIZED, "-"),
    ]


def draw_probe_effect(n: Numbers) -> Figure:
    """Plot the effect of editing single heads against the accuracy of their probes."""
    with house_style():
        figure = new_figure(3.6)
        best = n["single"]["best_probed"]["head"]
        for axis, score in zip(figure.subplots(1, 2), ("info_truth", "mc2"), strict=True):
            found, title = n["probe_effect"][score], score_title(score)
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
