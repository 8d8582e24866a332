"""Colours, and readable names of arms and scores."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from locaudit.errors import import_extra
from locaudit.stats.scores import find_score, is_judged

INK, PAPER = "#1d1e22", "#ffffff"
"""Colours of text and background. In a page they follow light and dark mode (`charts.THEMED`)."""
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
