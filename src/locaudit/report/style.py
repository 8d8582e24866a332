"""The common style of all figures, and readable names of arms and scores. Matplotlib is imported when first used."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locaudit.errors import import_extra
from locaudit.stats.scores import find_score, is_judged
from locaudit.store.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, PAPER = "#1d1e22", "#ffffff"
"""Colours of text and background. In a page they become `currentColor` and `var(--paper)`, so that figures change with
light and dark mode."""
FAINT, MIDDLE = "#8c8c8c", "#7d7d7d"
"""Colours of grid lines and curves, and of neutral legend marks. They are visible in light and dark mode."""
_ARMS: Mapping[str, tuple[str, str]] = {
    "base": ("unedited", INK),
    "claim": ("claim", "#D55E00"),
    "whole": ("whole model", "#009E73"),
    "rest": ("all but the claim", "#CC79A7"),
    "placebo": ("placebo", "#E69F00"),
    "control": ("control", "#0072B2"),
}
"""Name and colour of each arm, in the order of tables. The palette is Okabe and Ito's, which people with colour vision
deficiencies can distinguish."""
ARM_NAMES = {arm: name for arm, (name, _) in _ARMS.items()}
ARM_COLOURS = {arm: colour for arm, (_, colour) in _ARMS.items()}
MARKERS = "oD^vPX*"
"""Markers of the methods, in their order."""
DRIFT_TITLES: Mapping[str, str] = {"kl": "KL", "ce": "CE"}
FIT_TITLES: Mapping[str, str] = {"objective": "objective", "change": "change", "alpha": "α"}
"""Numbers about a fit (`TrialRecord.training`)."""
ASPECT_WORDS: Mapping[str, tuple[str, str]] = {
    "truth": ("truth", "true"),
    "info": ("information", "informative"),
    "negative": ("negativity", "negative"),
    "fluency": ("fluency", "fluent"),
}
DPI = 150


def score_title(score: str) -> str:
    """A score's name for readers. An unknown score keeps its raw name, which CSV and JSON files use for all scores."""
    return {**DRIFT_TITLES, **FIT_TITLES, "degenerate": "Degenerate"}.get(score) or find_score(score).title


def score_phrase(score: str, split: str = "") -> str:
    """The score as a quantity over questions: ``mean test MC2``, but ``test Info*Truth`` for a product of means."""
    words = ["" if is_judged(score) else "mean", split, score_title(score)]
    return " ".join(word for word in words if word)


def aspect_words(aspect: str) -> tuple[str, str]:
    """An aspect as a noun and as an adjective, such as ``truth`` and ``true``."""
    return ASPECT_WORDS.get(aspect, (aspect, aspect))


require = partial(import_extra, extra="report")
"""Import a module of the extra `report`. If it is missing, `ConfigError` says how to install it."""


@contextmanager
def house_style() -> Iterator[None]:
    """Set Matplotlib's style for drawing and saving. Leaving restores the caller's own style."""
    matplotlib = require("matplotlib")
    ours = matplotlib.rc_params_from_file(Path(__file__).with_name("house.mplstyle"), use_default_template=False)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **ours}):
        yield


def save(figure: Figure, folder: Path, name: str, *, pdf: bool = False) -> str:
    """Write `name`.png and .svg (and .pdf) into `folder`; returns the SVG text. Equal figures give equal bytes."""
    without_dates: dict[str, dict[str, Any]] = {
        "png": {"dpi": DPI, "metadata": {"Software": None}},
        "svg": {"metadata": {"Date": None, "Creator": "locaudit"}},
        "pdf": {"metadata": {"CreationDate": None, "Creator": "locaudit"}},
    }
    folder.mkdir(exist_ok=True)
    written = {}
    with house_style():
        for ending in ("png", "svg", "pdf") if pdf else ("png", "svg"):
            file = io.BytesIO()
            figure.savefig(file, format=ending, **without_dates[ending])
            figure.set_layout_engine("none")  # laid out once, not again for every format
            written[ending] = file.getvalue()
            write_atomically(folder / f"{name}.{ending}", written[ending])
    return written["svg"].decode()
