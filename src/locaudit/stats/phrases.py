"""The texts in `words.toml`, and the facts about a method that decide which of them are used."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from locaudit.stats.scores import Supports

_TEXTS = tomllib.loads(resources.files("locaudit.stats").joinpath("words.toml").read_text(encoding="utf-8"))


def say(part: str, name: str, **values: Any) -> str:
    """The text `name` in the section `part` of words.toml with `values` filled in; empty if it does not exist.

    A dot in `name` descends a level, as in ``clause.yes``.
    """
    text = _TEXTS[part]
    for key in name.split("."):
        text = text.get(key, "")
    return text.format(**values)


def where(null: str) -> str:
    """What the places of a null have in common with the claim, to follow a noun: `` in its layers``."""
    words = say("nulls", null)
    return f" {words}" if words else ""


@dataclass(frozen=True)
class MethodFacts:
    """What the statistics need to know about a method."""

    title: str
    """Name in reports, for example ``Optimal edit``."""
    supports: Supports = "higher"
    """Whether higher or lower scores support the claim."""
    trained: bool = False
    """Whether the method's edits are trained. The headline is about the first trained method."""
    null: Literal["places", "directions"] = "places"
    """What controls are: edits at random places, or edits in random directions at the claim."""
    symbol: str = ""
    """Symbol of the strength that the method's grid varies, for example ``alpha``."""
    n_strengths: int = 1
    """Number of strengths in the method's grid."""
    training: Mapping[str, Any] | None = None
    """Training settings, by name; None if edits are not trained."""

    @property
    def reaches(self) -> str:
        """Where the score of a control that does as well is, relative to the claim's score."""
        return "at or above" if self.supports == "higher" else "at or below"

    @property
    def terms(self) -> Mapping[str, str]:
        """Terms to fill into texts about the method, by field name; ``{noun}`` is left in them."""
        return {**_TEXTS["terms"][self.supports], **_TEXTS["terms"][self.null]}


def short(x: float, decimals: int = 2, sign: str = "") -> str:
    """A number as tables show it, without the zero before the point: ``.29``, ``-.05``, ``1.20``; a dash for NaN."""
    if not math.isfinite(x):
        return "-"
    text = f"{x:{sign}.{decimals}f}"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 and decimals else text


def short_p(p: float) -> str:
    """A p-value with two significant digits: ``.05``, ``.0003``."""
    return "-" if math.isnan(p) else f"{float(f'{p:.2g}'):.10f}".rstrip("0").replace("0.", ".", 1).rstrip(".") or "0"


def short_interval(interval: tuple[float, float], decimals: int = 2) -> str:
    """``[+.33, +.45]``; empty if it is not known."""
    low, high = interval
    return f"[{short(low, decimals, '+')}, {short(high, decimals, '+')}]" if math.isfinite(high - low) else ""
