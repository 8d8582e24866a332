"""The texts of `words.toml`, and what statistics must know of a method to choose among them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from locaudit.stats.scores import Supports

_TEXTS = tomllib.loads(resources.files("locaudit.stats").joinpath("words.toml").read_text(encoding="utf-8"))


def say(part: str, name: str, **values: Any) -> str:
    """The text `name` of a `part` of words.toml, with `values` filled in; empty where there is none."""
    text = _TEXTS[part]
    for key in name.split("."):
        text = text.get(key, "")
    return text.format(**values)


@dataclass(frozen=True)
class MethodFacts:
    """What statistics must know of a method."""

    title: str
    """What readers call it, for example ``Optimal edit``."""
    supports: Supports = "higher"
    """Whether higher or lower scores support the claim."""
    trained: bool = False
    """Whether its edits are trained; the first such method leads the headline."""
    null: Literal["places", "directions"] = "places"
    """Controls are random places, or random directions at the claim."""
    symbol: str = ""
    """The grid's letter, for example ``alpha``."""
    n_strengths: int = 1
    """Size of the grid."""
    training: Mapping[str, Any] | None = None
    """How it was trained, by setting."""

    @property
    def reaches(self) -> str:
        """Where a control's score is that does as well as the claim's."""
        return "at or above" if self.supports == "higher" else "at or below"

    @property
    def terms(self) -> Mapping[str, str]:
        """Words of texts about the method, by field."""
        title = self.title[:1].upper() + self.title[1:]
        edits = f"{title}s" if title.endswith(" edit") else f"{title} edits"
        return {**_TEXTS["terms"][self.supports], **_TEXTS["terms"][self.null], "edits": edits}
