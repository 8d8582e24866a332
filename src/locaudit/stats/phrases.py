"""The texts in `words.toml`, and the facts about a method that decide which of them are used."""

from __future__ import annotations

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
        """Terms to fill into texts about the method, by field name."""
        title = self.title[:1].upper() + self.title[1:]
        edits = f"{title}s" if title.endswith(" edit") else f"{title} edits"
        return {**_TEXTS["terms"][self.supports], **_TEXTS["terms"][self.null], "edits": edits}
