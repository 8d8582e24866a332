"""The figures of the page: the paper's, named as its files, and ours; what each shows, in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from locaudit.report.figures import draw_probes
from locaudit.studies.paper.figures import (
    BEST,
    LOCALIZED,
    RANDOM,
    SINGLE,
    WHOLE,
    Numbers,
    Series,
    claimed_heads,
    draw_histogram,
    draw_kl_mc,
    draw_landscape,
    draw_probe_effect,
    draw_single_heads,
    draw_truth_info,
    small,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """A figure of the study."""

    name: str
    """File name; where the paper has the figure, its file's name."""
    section: str
    """Part of the page."""
    title: str
    caption: str
    alt: str
    draw: Callable[[], Figure]


def panels(n: Numbers) -> list[Panel]:
    """Every figure that there are numbers for, in the page's order."""
    found = [_probes(n), *_iti(n), _against_iti(n), *_sets(n), *_single(n), *_special(n)]
    return [*found, _landscape(n)] if n["landscape"] else found


_POINTS = "Every trial is a point; filled: the hyperparameter that validation chose for its location"
_CURVE = "Dotted: the unedited model; the curve holds its Info*Truth"
_FRONTIER = "The lines join the trials that no other of their kind beats in both"
_LINES = "Lines: the same edit at the probed heads and of the whole model, and the unedited model"


def _caption(n: Numbers, *sentences: str) -> str:
    counts = n["setup"]["n_questions"]
    return (
        f"{'. '.join(sentences)}. {counts['test']} test questions; hyperparameters chosen on {counts['val']} "
        "validation questions."
    )


def _iti(n: Numbers) -> list[Panel]:
    k, sets, grid = n["setup"]["n_localized"], n["iti"]["n_random"], _grid(n["iti"])
    where = f"under ITI at the {k} probed heads and {sets} random sets of {k}, alpha = {grid}"
    return [
        Panel(
            "hist_iti",
            "localized",
            "Info*Truth of ITI at random sets of heads",
            _caption(n, f"Info*Truth of ITI at {sets} random sets of {k} heads", _LINES, _p_words(n["iti"])),
            _histogram_alt("ITI", n["iti"]),
            lambda: draw_histogram(n, n["iti"], "random sets", "ITI"),
        ),
        Panel(
            "iti_truth_info",
            "localized",
            "Truth and Info under ITI",
            _caption(n, f"Shares of answers judged true and informative {where}", _POINTS, _CURVE),
            "Scatter plot of Truth against Info under ITI.",
            lambda: draw_truth_info(
                n, [_random(n["iti"], "random sets, ITI"), _localized(n["iti"], "probed heads, ITI")]
            ),
        ),
        Panel(
            "iti_kl_mc",
            "localized",
            "MC and KL under ITI",
            _caption(n, f"MC2 against KL drift {where}", _POINTS, "Validation chose by Info*Truth"),
            "Scatter plot of MC2 against KL under ITI.",
            lambda: draw_kl_mc(
                n, [_random(n["iti"], "random sets, ITI", _AT_KL), _localized(n["iti"], "probed heads, ITI", _AT_KL)]
            ),
        ),
    ]


def _against_iti(n: Numbers) -> Panel:
    k = n["setup"]["n_localized"]
    what = (
        f"Truth against Info: ITI at the {k} probed heads (alpha = {_grid(n['iti'])}), optimal edits there and of the "
        f"whole model (tau = {_grid(n['optimal'])})"
    )
    return Panel(
        "stronger_evidence_for_loc",
        "optimal",
        "Optimal edits against ITI",
        _caption(n, what, _POINTS, _FRONTIER, _CURVE),
        "Scatter plot of Truth against Info: ITI and optimal edits.",
        lambda: draw_truth_info(
            n,
            [
                _localized(n["iti"], "probed heads, ITI", colour=BEST, marker="o", frontier=True),
                _localized(n["optimal"], "probed heads, optimal", frontier=True),
                _whole(n["optimal"], "whole model, optimal", frontier=True),
            ],
        ),
    )


def _sets(n: Numbers) -> list[Panel]:
    k, sets = n["setup"]["n_localized"], n["iti"]["n_random"]
    what = (
        f"Truth against Info of optimal edits at the {k} probed heads, at {sets} random sets of {k} and of the whole "
        f"model, tau = {_grid(n['optimal'])}"
    )
    words = f"Info*Truth of the optimal edit at the same {sets} random sets of {k} heads"
    return [
        Panel(
            "hist_ipo",
            "random",
            "Info*Truth of optimal edits at random sets of heads",
            _caption(n, words, _LINES, _p_words(n["optimal"])),
            _histogram_alt("optimal edits", n["optimal"]),
            lambda: draw_histogram(n, n["optimal"], "random sets", "Optimal edit"),
        ),
        Panel(
            "random_vs_top",
            "random",
            "Truth and Info of optimal edits",
            _caption(n, what, _POINTS, _FRONTIER, _CURVE),
            "Scatter plot of Truth against Info under optimal edits.",
            lambda: draw_truth_info(
                n,
                [
                    _random(n["optimal"], "random sets, optimal"),
                    _whole(n["optimal"], "whole model, optimal", frontier=True),
                    _localized(n["optimal"], "probed heads, optimal", frontier=True),
                ],
            ),
        ),
    ]


def _single(n: Numbers) -> list[Panel]:
    k, single = n["setup"]["n_localized"], n["single"]
    heads = single["n_random"]
    return [
        Panel(
            "hist_ipo_1",
            "single",
            "Info*Truth of optimal edits at single heads",
            _caption(
                n,
                f"Info*Truth of the optimal edit at {heads} random single heads. Lines: the {k} probed heads together, "
                "the best probed head alone, the whole model, and the unedited model",
                f"{single['matching']['match']} of {heads} match the {k} probed heads, {single['matching']['worse']} "
                f"are worse, for {single['matching']['undecided']} the questions are too few",
            ),
            "Histogram of Info*Truth at single heads.",
            lambda: draw_single_heads(n),
        ),
        Panel(
            "single_vs_top",
            "single",
            "Truth and Info of optimal edits at single heads",
            _caption(
                n,
                f"Truth against Info of optimal edits at {heads} random single heads, the best probed head, and the "
                f"{k} probed heads together, tau = {_grid(n['optimal'])}",
                _POINTS,
                _FRONTIER,
                _CURVE,
            ),
            "Scatter plot of Truth against Info at single heads.",
            lambda: draw_truth_info(
                n,
                [
                    _random(single, "random single heads", colour=SINGLE),
                    Series("best probed head", BEST, "^", tuple(_points(single["best_probed"], _AT_INFO))),
                    _localized(n["optimal"], f"{k} probed heads", frontier=True),
                ],
            ),
        ),
    ]


def _special(n: Numbers) -> list[Panel]:
    k, sets, n_heads = n["setup"]["n_localized"], n["iti"]["n_random"], n["probe_effect"]["info_truth"]["n"]
    return [
        Panel(
            "random_vs_top_MC_KL",
            "special",
            "MC and KL under optimal edits",
            _caption(
                n,
                f"MC2 against KL drift of optimal edits at the {k} probed heads and {sets} random sets of {k}, tau = "
                f"{_grid(n['optimal'])}",
                _POINTS,
                "Validation chose by Info*Truth",
            ),
            "Scatter plot of MC2 against KL under optimal edits.",
            lambda: draw_kl_mc(
                n,
                [
                    _random(n["optimal"], "random sets, optimal", _AT_KL),
                    _localized(n["optimal"], "probed heads, optimal", _AT_KL),
                ],
            ),
        ),
        Panel(
            "probe_effect",
            "special",
            "Probe accuracy and effect of the optimal edit at a single head",
            _caption(
                n,
                f"Each point is one of {n_heads} single heads: what its optimal edit gains over the unedited model "
                "against the accuracy of its probe; left Info*Truth, right MC2, each with the tau that validation "
                "chose by it",
            ),
            "Two scatter plots of edit effect against probe accuracy.",
            lambda: draw_probe_effect(n),
        ),
    ]


def _probes(n: Numbers) -> Panel:
    setup, probes = n["setup"], n["setup"]["probes"]
    return Panel(
        "probes",
        "setup",
        "Probe accuracy of every head",
        f"Accuracy of each head's probe of true against false answers on {probes['n_val']} examples held out from the "
        f"training questions (trained on {probes['n_train']}). Outlined: the {setup['n_localized']} best, which are "
        "the localization that is tested.",
        "Heat map of probe accuracy by layer and head.",
        lambda: draw_probes(probes["val_accuracy"], probes["majority"], claimed_heads(setup)),
    )


def _landscape(n: Numbers) -> Panel:
    land = n["landscape"]
    return Panel(
        "landscape",
        "landscape",
        "An optimal edit at every head",
        f"Above: probe accuracy of every head. Below: what the optimal edit (tau = {land['tau']:g}) of that head alone "
        f"gains in Info*Truth over the unedited model, on {n['setup']['n_questions']['test']} test questions. "
        f"Spearman's rank correlation of the two over {land['n']} heads: {small(land['info_truth']['spearman'])} "
        f"(permutation p = {small(land['info_truth']['p'])}). Outlined: the {n['setup']['n_localized']} probed heads.",
        "Two heat maps by layer and head.",
        lambda: draw_landscape(n),
    )


_AT_INFO, _AT_KL = ("info", "truth"), ("kl", "mc2")


def _points(block: Numbers | None, axes: tuple[str, str]) -> list[tuple[float, float, bool]]:
    if block is None:
        return []
    chosen = (block["chosen"] or {}).get("hyperparameter")
    return [
        (trial[axes[0]], trial[axes[1]], trial["hyperparameter"] == chosen)
        for trial in block["trials"]
        if trial[axes[0]] is not None and trial[axes[1]] is not None
    ]


def _random(method: Numbers, label: str, axes: tuple[str, str] = _AT_INFO, colour: str = RANDOM) -> Series:
    return Series(label, colour, "o", tuple(p for b in method["random"] for p in _points(b, axes)), large=False)


def _localized(
    method: Numbers,
    label: str,
    axes: tuple[str, str] = _AT_INFO,
    *,
    colour: str = LOCALIZED,
    marker: str = "D",
    frontier: bool = False,
) -> Series:
    return Series(label, colour, marker, tuple(_points(method["localized"], axes)), frontier=frontier)


def _whole(method: Numbers, label: str, frontier: bool = False) -> Series:
    return Series(label, WHOLE, "s", tuple(_points(method["whole"], _AT_INFO)), frontier=frontier)


def _grid(method: Numbers) -> str:
    return ", ".join(f"{x:g}" for x in method["grid"])


def _p_words(method: Numbers) -> str:
    return (
        f"{method['n_at_least']} of {method['n_random']} random sets score at least as high as the probed heads: "
        f"Monte-Carlo p = {method['p_monte_carlo']:.3f} (the smallest possible is {method['p_smallest']:.3f}); "
        f"parametric, as papers often give it: t-test p = {small(method['p_t_test'])}, normal tail p = "
        f"{small(method['p_normal_tail'])}"
    )


def _histogram_alt(what: str, method: Numbers) -> str:
    return (
        f"Histogram of Info*Truth under {what} at {method['n_random']} random sets; "
        f"{method['n_at_least']} reach the probed heads."
    )
