"""The figures of a study: the paper's figures, under its file names, and our own. Captions are in `paper.html`.

`draw_study` makes files for papers, `page_charts` the same figures for the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from locaudit.report.charts import Chart, HeatMap, Series, heat_chart, scatter_chart
from locaudit.report.figures import draw, save
from locaudit.report.html import plain
from locaudit.report.strip import Mark, Spread, draw_strip, strip_chart
from locaudit.report.style import ARM_COLOURS, INK, MIDDLE, score_title

Numbers = Mapping[str, Any]
LOCALIZED, RANDOM, WHOLE = ARM_COLOURS["claim"], ARM_COLOURS["control"], ARM_COLOURS["whole"]
OUTCOMES = {"replicated": (WHOLE, "o"), "not replicated": (LOCALIZED, "X"), "open": (MIDDLE, "s")}
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


def draw_study(n: Numbers, specification: Sequence[Numbers], folder: Path) -> None:
    """Draw the figures into `folder` as PNG, SVG and PDF, except those without any data."""
    charts = page_charts(n)[1]
    for score in ("judged", "mc2") if n["single"] else ():
        found = n["probe_effect"][score]
        words = f"Spearman {plain(found['spearman'], '.2g')}, p = {plain(found['p'], '.2g')}, n = {found['n']}"
        charts[f"probe_effect_{score}"]["layout"]["title"] = {"text": words}
    figures = {name: [chart] for name, chart in charts.items() if name in (*SCATTERS, "probes")}
    figures["specification"] = [specification_chart(n["claims"], specification)]
    for name, (spread, what, colour) in _spreads(n).items():
        figures[name] = [strip_chart([spread], xlabel=_xlabel(n), what=what.removesuffix("s"), colour=colour)]
    for name in ("probe_effect", "landscape"):
        if found := [chart for key, chart in charts.items() if key.startswith(name)]:
            figures[name] = found
    for name, parts in figures.items():
        figure = draw(parts)
        for form in ("png", "svg", "pdf"):
            save(figure, folder, name, form)


def page_charts(n: Numbers) -> tuple[dict[str, str], dict[str, Chart]]:
    """Name -> SVG of each distribution over random places, and name -> chart of each other figure of the page."""
    strips, charts = {}, {}
    for name, (spread, what, _) in _spreads(n).items():
        alt = f"{spread.title}: {_xlabel(n)} of {len(spread.scores)} {what}"
        strips[name] = draw_strip([spread], xlabel=_xlabel(n), what=what.removesuffix("s"), alt=alt)
    for name, (series, (x, y), base) in _scatters(n).items():
        is_drift = x == score_title("kl")
        x = "KL from the unedited model (nats per token)" if is_drift else f"{x} on test"
        lines, product = ((None, base[1]), "") if is_drift else (base, "unedited Info*Truth")
        charts[name] = scatter_chart(
            series, xlabel=x, ylabel=f"{y} on test", base=lines, product=product, is_drift=is_drift
        )
    for name, (maps, floor) in _maps(n).items():
        for i, heat in enumerate(maps):
            charts[name if not i else f"{name}_{i}"] = heat_chart(heat, _localized(n), floor=floor if not i else None)
    for score in ("judged", "mc2") if n["single"] else ():
        charts[f"probe_effect_{score}"] = _probe_effect(n, score)
    return strips, charts


def _probe_effect(n: Numbers, score: str) -> Chart:
    """The effect of editing single heads against the accuracy of their probes."""
    best, found = n["single"]["best_probed"]["head"], n["probe_effect"][score]
    pairs = list(zip(found["heads"], found["val_accuracy"], found["effects"], strict=True))
    series = [
        Series(label, colour, "o", [(x, y, True) for head, x, y in pairs if (head == best) is is_best])
        for label, colour, is_best in (("random single heads", SINGLE, False), ("best probed head", BEST, True))
    ]
    title = score_title(n["setup"]["score"] if score == "judged" else score)
    return scatter_chart(
        series, xlabel="probe accuracy on validation", ylabel=f"{title}, minus unedited", base=(None, 0.0)
    )


def specification_grid(claims: Sequence[Numbers], rows: Sequence[Numbers]) -> tuple[list[str], dict[str, list[Any]]]:
    """The choices that are columns of `draw_specification`, and claim -> its outcome in each, then all its counts."""
    single = {(row["claim"], _option(row)): row["outcome"] for row in rows if row["changed"] is not None}
    columns = list(dict.fromkeys(option for _, option in single))
    grid = {}
    for claim in (claim["name"] for claim in claims):
        found = [row["outcome"] for row in rows if row["claim"] == claim]
        counts = " / ".join(str(found.count(outcome)) for outcome in OUTCOMES)
        grid[claim] = [*(single.get((claim, option)) for option in columns), counts]
    return columns, grid


def _localized(n: Numbers) -> list[tuple[int, int]]:
    heads = [row["head"].split(".") for row in n["setup"]["localized"]]
    return [(int(layer), int(head)) for layer, head in heads]


def _xlabel(n: Numbers) -> str:
    return f"{score_title(n['setup']['score'])} on test"


def _spreads(n: Numbers) -> dict[str, tuple[Spread, str, str]]:
    """Name -> distribution over random places with its marks, what a place is, and its colour."""
    found = {}
    for name, block, title in (("hist_ipo", "optimal", "Optimal edit"), ("hist_iti", "iti", "ITI")):
        if method := n[block]:
            marks = _marks(n, method["whole"]["score"], method["localized_score"])
            spread = Spread(_title(n, title, f"{method['n_random']} sets"), method["random_scores"], marks)
            found[name] = spread, "random sets", RANDOM
    if single := n["single"]:
        best = Mark("best probed head", single["best_probed"]["score"], BEST, "-.")
        marks = [*_marks(n, single["whole_score"], single["localized_score"]), best]
        scores, title = [row["score"] for row in single["random"]], f"{single['n_random']} heads"
        found["hist_ipo_1"] = Spread(_title(n, "Optimal edit", title), scores, marks), "random single heads", SINGLE
    return found


def _scatters(n: Numbers) -> dict[str, tuple[list[Series], tuple[str, str], tuple[float, float]]]:
    """Name -> series, titles of both axes, and values of the unedited model."""
    found = {}
    for name, ((x, y), trials) in SCATTERS.items():
        series = [_series(n, one, x, y) for one in trials]
        if all(n[one.block] for one in trials) and any(one.points for one in series):
            found[name] = series, (score_title(x), score_title(y)), (n["base"][x], n["base"][y])
    return found


def _maps(n: Numbers) -> dict[str, tuple[list[HeatMap], float | None]]:
    """Name -> heat maps, and the value at which the scale of the first begins."""
    accuracy = n["setup"]["probes"]["val_accuracy"]
    found: dict[str, Any] = {"probes": ([HeatMap(accuracy, "validation accuracy")], n["setup"]["probes"]["majority"])}
    if n["landscape"]:
        effects = np.asarray(n["landscape"]["judged"]["effects"], dtype=float)
        reach = max(float(np.nanmax(np.abs(effects))), 1e-6)
        gained = HeatMap(effects, "Info*Truth gained", reach=reach)
        found["landscape"] = [HeatMap(accuracy, "probe accuracy"), gained], None
    return found


def specification_chart(claims: Sequence[Numbers], rows: Sequence[Numbers]) -> Chart:
    """What becomes of each claim if one choice is changed, and in how many of all combinations it is decided.

    Each row is a claim, with the numbers of combinations of all choices by outcome. The first column has the choices
    that decide, without the correction over claims; each further column changes one of them.
    """
    columns, grid = specification_grid(claims, rows)
    cells = [(x, y, own) for y, (*found, _) in enumerate(grid.values()) for x, own in enumerate(found)]
    series = [
        Series(outcome, *look, [(x, y, True) for x, y, own in cells if own == outcome])
        for outcome, look in OUTCOMES.items()
    ]
    chart = scatter_chart(series, xlabel="", ylabel="")
    names = [f"{claim.replace('_', ' ')}  {counts}" for claim, (*_, counts) in grid.items()]
    chart["layout"] |= {
        "xaxis": {"tickvals": list(range(len(columns))), "ticktext": columns, "tickangle": -55},
        "yaxis": {"tickvals": list(range(len(names))), "ticktext": names, "range": [len(names) - 0.5, -0.5]},
        "height": 90 + 22 * len(names),
    }
    return chart


def _option(row: Numbers) -> str:
    """The column of a row that changes one choice or none."""
    choice = row["changed"]
    if choice.endswith("score"):
        return score_title(row[choice])
    return f"{choice}: {row[choice]}" if choice else "nothing changed"


def _series(n: Numbers, trials: Trials, x: str, y: str) -> Series:
    """The trials of a place, chosen ones marked: by MC2 at the probed heads (as its claims are tested), or its own."""
    found, points = (n[trials.block] or {}).get(trials.place, []), []
    for block in found if isinstance(found, list) else [found]:
        choice = n["multiple_choice"][trials.block] if (x, y) == DRIFT else block["chosen"]
        chosen = (choice or {}).get("localized_hyperparameter" if (x, y) == DRIFT else "hyperparameter")
        points += [
            (trial[x], trial[y], trial["hyperparameter"] == chosen)
            for trial in block["trials"]
            if trial[x] is not None and trial[y] is not None
        ]
    label = trials.label.format(k=n["setup"]["n_localized"])
    return Series(label, trials.colour, trials.marker, points, trials.place != "random", trials.frontier)


def _title(n: Numbers, method: str, places: str) -> str:
    return f"{method}, {places}, {n['setup']['n_questions']['test']} test questions"


def _marks(n: Numbers, whole: float | None, localized: float | None) -> list[Mark]:
    return [
        Mark(f"{n['setup']['n_localized']} probed heads", localized, LOCALIZED, "-"),
        Mark("whole model", whole, WHOLE, "--"),
        Mark("unedited model", n["base"][n["setup"]["score"]], INK, ":"),
    ]
