"""One look for every figure: palette, fonts, a lazily imported matplotlib, and files that never carry a date."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locaudit.errors import LocauditError
from locaudit.stats import JUDGED
from locaudit.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1d1e22"
"""Text and axes. In the page it becomes `currentColor`, so that figures follow light and dark mode."""
PAPER = "#ffffff"
"""Background. In the page it becomes `var(--paper)`."""
ARM_COLOURS: Mapping[str, str] = {
    "claim": "#D55E00",
    "control": "#0072B2",
    "whole": "#009E73",
    "rest": "#CC79A7",
    "base": INK,
}
"""Okabe and Ito's palette, told apart by every common colour vision."""
ARM_NAMES: Mapping[str, str] = {
    "base": "unedited",
    "claim": "claim",
    "control": "control",
    "whole": "whole model",
    "rest": "all but the claim",
}
METHOD_TITLES: Mapping[str, str] = {"iti": "ITI", "optimal": "Optimal edit"}
SCORE_TITLES: Mapping[str, str] = {
    "info_truth": "Info*Truth",
    "info_truth_probability": "Info*Truth (probabilities)",
    "info_truth_both": "Info*Truth (both)",
    "truth": "Truth",
    "info": "Info",
    "mc1": "MC1",
    "mc2": "MC2",
    "mc3": "MC3",
    "preference_accuracy": "preference accuracy",
    "reward_accuracy": "reward accuracy",
    "reward_margin": "reward margin",
    "kl": "KL",
    "ce": "CE",
}
"""Names of scores for readers; files for machines keep the raw ones."""
DPI = 150

_RC = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "locaudit",
    "axes.unicode_minus": True,
}


def score_title(score: str) -> str:
    """What readers call the score; an unknown one is called by its own name."""
    return SCORE_TITLES.get(score, score)


def score_phrase(score: str) -> str:
    """The score as a quantity over questions: ``mean MC2``, but ``Info*Truth``, which is no mean of questions."""
    return score_title(score) if score in JUDGED else f"mean {score_title(score)}"


def require(module: str) -> Any:
    """Import a module of the extra `report`; `LocauditError` names the extra when it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise LocauditError(
            got=f"an environment without {module.partition('.')[0]}",
            expected="the packages that draw a report",
            remedy='run pip install "locaudit[report]"',
        ) from None


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's settings for drawing and saving; the caller's own come back on leaving."""
    matplotlib = require("matplotlib")
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_RC, "backend": "agg"}):
        yield


def save(figure: Figure, folder: Path, name: str, *, pdf: bool = False) -> str:
    """Write `name`.png and .svg (and .pdf) into `folder`; returns the SVG text. Equal figures give equal bytes."""
    with house_style():
        png, svg, page = io.BytesIO(), io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": "locaudit"})
        if pdf:
            figure.savefig(page, format="pdf", metadata={"CreationDate": None, "Creator": "locaudit"})
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.png", png.getvalue())
    write_atomically(folder / f"{name}.svg", svg.getvalue())
    if pdf:
        write_atomically(folder / f"{name}.pdf", page.getvalue())
    return svg.getvalue().decode()
