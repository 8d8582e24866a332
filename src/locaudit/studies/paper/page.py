"""The study's page: one self-contained HTML file, from `paper.html` and the reports' style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from locaudit.config import to_yaml
from locaudit.report.html import inline_svg, render
from locaudit.report.view import spell_duration
from locaudit.stats.matching import LEAST_DIFFERING
from locaudit.studies.paper.config import PaperConfig, Part
from locaudit.studies.paper.panels import Panel

SECTIONS: Mapping[str, str] = {
    "setup": "Probes",
    "localized": "ITI at probed and at random heads",
    "optimal": "Optimal edits against ITI",
    "random": "Optimal edits at probed and at random heads",
    "single": "Single heads",
    "special": "What probed heads are good for",
    "landscape": "Every head",
}
"""Parts of the page that have figures, in the paper's order."""
PART_TITLES: Mapping[Part, str] = {
    "sets": "probed heads against random sets",
    "single": "best probed head against random heads",
    "landscape": "every head",
}


def render_paper(
    numbers: Mapping[str, Any], drawn: Sequence[tuple[Panel, str]], config: PaperConfig, parts: Sequence[Part]
) -> str:
    """HTML of the study; every number on it is in `numbers`."""
    figures: dict[str, list[dict[str, Any]]] = {section: [] for section in SECTIONS}
    for panel, svg in drawn:
        picture = inline_svg(svg, panel.name, panel.alt)
        figures[panel.section].append(
            {"name": panel.name, "title": panel.title, "svg": picture, "caption": panel.caption}
        )
    outcomes = [claim["outcome"] for claim in numbers["claims"]]
    return render(
        "studies/paper/paper.html",
        n=numbers,
        infinity=math.inf,
        least_differing=LEAST_DIFFERING,
        resolution=_half_width(numbers["gains"]["localized optimal over whole optimal"]),
        counts={word: outcomes.count(word) for word in ("replicated", "not replicated", "could not test")},
        sections=SECTIONS,
        figures=figures,
        time=spell_duration(math.fsum(numbers["run"]["seconds"].values())),
        yaml=to_yaml(config),
        parts={part: PART_TITLES[part] for part in parts},
    )


def _half_width(found: Mapping[str, Any]) -> float:
    low, high = found["interval_90"]
    return math.inf if low is None or high is None or found["few"] else (high - low) / 2
