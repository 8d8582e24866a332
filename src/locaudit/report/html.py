"""The page: one self-contained HTML file, drawn from `template.html` and `report.css` with every text escaped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from locaudit.config import AuditConfig, to_yaml
from locaudit.records import TrialRecord
from locaudit.report import view
from locaudit.report.answers import N_OPEN, Conversation
from locaudit.report.judged import JudgedTable
from locaudit.report.style import ARM_COLOURS, INK, METHOD_TITLES, PAPER, require, score_phrase, score_title
from locaudit.stats import JUDGED, Verdict, conclusion
from locaudit.stats.scores import THRESHOLD

RUN_FACTS = (
    "model", "fingerprint", "n_layers", "n_heads", "n_units", "behaviour", "n_questions", "planned", "claim",
    "claim_source", "versions", "device", "threads",
)  # fmt: skip
"""Keys of the store's fact ``run`` that the page shows; each may be missing."""
QUESTIONS: Mapping[str, str] = {
    "sufficiency": "Sufficiency: does an edit there work?",
    "specificity": "Specificity: better than elsewhere?",
    "necessity": "Necessity: does it take the claim?",
    "uniqueness": "Uniqueness: the only such place?",
}
_MATCHING: Mapping[str, str] = {
    "none": "",
    "layer": ", as many in each layer as the claim",
    "kv-group": ", as many in each group of heads that share keys and values as the claim",
    "probe-accuracy": ", matched by probe accuracy",
    "norm": ", matched by the norm of their activations",
}
MISSING = "–"
"""Stands where nothing was measured."""


@dataclass(frozen=True)
class Drawing:
    """A figure as the page shows it."""

    name: str
    """Also the anchor, and the file name in ``figures/``."""
    svg: str
    caption: str
    alt: str
    """What a reader who cannot see it is told."""


def render_page(
    verdict: Verdict,
    records: Sequence[TrialRecord],
    config: AuditConfig,
    *,
    run: Mapping[str, Any],
    seconds: Mapping[str, float],
    drawings: Sequence[Drawing],
    judged: JudgedTable | None,
    answers: Sequence[Conversation],
    registered: view.Registered | None = None,
) -> str:
    """HTML text of the report.

    Args:
        verdict: What is shown; every number of a card is one of its numbers.
        records: All records of the run.
        config: The run's configuration.
        run: The store's fact ``run``; any key may be missing.
        seconds: Wall-clock seconds by trial id.
        drawings: Figures, in order.
        judged: Scores of the answers; None if nothing was judged.
        answers: What the models say to the first test questions; empty if nothing was generated.
        registered: The claim file that was fixed before the run; None without one.

    """
    names = view.columns(records, verdict.score)
    claim = run.get("claim") or verdict.claim
    return render(
        "report/template.html",
        verdict=verdict,
        score=score_phrase(verdict.score),
        is_judged=verdict.score in JUDGED,
        score_title=score_title,
        config=config,
        run={key: run.get(key) for key in RUN_FACTS},
        registered=registered,
        unfinished=view.missing_parts(records, verdict, config, run.get("planned")),
        titles=METHOD_TITLES,
        matching=_MATCHING[config.match],
        questions=QUESTIONS,
        conclusion=conclusion,
        symbols={method: view.hyperparameter_symbol(method, config) for method in METHOD_TITLES},
        ranges={method: view.control_range(judged) for method, judged in verdict.methods.items()},
        claim=claim,
        n_claimed=len(claim.split(",")),
        claim_kind="neuron" if claim.startswith("neurons:") else "head",
        short_location=view.short_location,
        drawings=[{"name": d.name, "svg": inline_svg(d.svg, d.name, d.alt), "caption": d.caption} for d in drawings],
        columns=names,
        formats={name: {"kl": "#.3g"}.get(name, ".3f") for name in names},
        base=view.base_row(records, names),
        tables=view.method_rows(records, verdict, config, names),
        judged=judged,
        threshold=THRESHOLD,
        answers=answers,
        n_open=N_OPEN,
        failures=view.failures(records, config),
        yaml=to_yaml(config),
        config_hash=config.hash,
        n_records=len(records),
        time=view.spell_duration(math.fsum(seconds.values())) if seconds else None,
    )


def render(template: str, **values: Any) -> str:
    """A page from a template (a path within the package); texts in `values` are escaped, `css` is the style sheet."""
    jinja, markup = require("jinja2"), require("markupsafe").Markup
    environment = jinja.Environment(
        autoescape=True, undefined=jinja.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = lambda value, spec=".3f": markup(number(value, spec))
    page = environment.from_string(_packaged(template))
    return page.render(css=markup(_packaged("report/report.css")), **values)


def number(value: float | None, spec: str) -> str:
    """The number rounded for reading, the exact one in the ``value`` attribute; a dash for None, NaN and infinity.

    A true minus sign takes the hyphen's place, so that signs line up with plus signs.
    """
    if value is None or not math.isfinite(value):
        return MISSING
    return f'<data value="{value!r}">{escape(format(value, spec)).replace("-", "−")}</data>'


def inline_svg(svg: str, prefix: str, alt: str) -> str:
    """An SVG file's text as an element of the page.

    Drops the prologue and fixed size, makes ids unique by `prefix`, and lets ink, paper and the controls' blue follow
    the page's colours.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = svg.replace(ARM_COLOURS["control"].lower(), "var(--control)")
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return require("markupsafe").Markup(f'{head} role="img" aria-label="{escape(alt)}">{body}')


def _packaged(name: str) -> str:
    return resources.files("locaudit").joinpath(name).read_text(encoding="utf-8")
