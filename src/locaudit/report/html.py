"""Render self-contained HTML pages from templates of the package, with every text escaped."""

from __future__ import annotations

import math
import re
from functools import cache
from html import escape
from importlib import resources
from statistics import fmean
from typing import Any

from locaudit.location import short_location
from locaudit.report.style import ARM_COLOURS, INK, PAPER, aspect_words, require, score_phrase, score_title
from locaudit.report.tables import place_name, reading_words
from locaudit.stats.phrases import where
from locaudit.stats.scores import THRESHOLD, named_score
from locaudit.text import readable

MISSING = "–"
"""Shown where nothing was measured."""


def render(template: str, **values: Any) -> str:
    """Render a template, given by its path within the package. Texts in `values` are escaped and made `readable`."""
    require("jinja2")
    return environment().get_template(template).render(values)


@cache
def environment(*, autoescape: bool = True) -> Any:
    """A Jinja environment with filters for names and numbers. Every file of the package can be a template."""
    jinja, markup = require("jinja2"), require("markupsafe").Markup
    found = jinja.Environment(
        loader=jinja.FunctionLoader(lambda name: resources.files("locaudit").joinpath(name).read_text("utf-8")),
        autoescape=autoescape,
        # Applied to every value that a template shows. type(x) keeps values that already are HTML from being escaped.
        finalize=lambda x: type(x)(readable(x)) if isinstance(x, str) else x,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": lambda value, spec=".3f": markup(number(value, spec)),
        "plain": plain,
        "inline": inline_svg,
        "score": score_title,
        "phrase": score_phrase,
        "named": named_score,
        "noun": lambda aspect: aspect_words(aspect)[0],
        "aspect": lambda aspect: aspect_words(aspect)[1],
        "place_name": place_name,
        "where": where,
        "place": lambda text: short_location(text).replace(",", ", "),
        "mean": fmean,
        "settings": reading_words,
        "escaped": lambda text: repr(text)[1:-1],
        "duration": spell_duration,
        "sentence": lambda text: text[:1].upper() + text[1:],
    }
    found.tests |= {"finite": lambda x: x is not None and math.isfinite(x)}
    found.globals["threshold"] = THRESHOLD
    return found


def number(value: float | None, spec: str = ".3f") -> str:
    """HTML of a rounded number, with all its digits in the ``value`` attribute; a dash for None, NaN and infinity."""
    text = plain(value, spec)
    return text if text == MISSING else f'<data value="{value!r}">{escape(text)}</data>'


def plain(value: float | None, spec: str = ".3f") -> str:
    """Text of a rounded number; a dash for None, NaN and infinity.

    Instead of a hyphen, it has a true minus sign, which is as wide as a plus sign.
    """
    return MISSING if value is None or not math.isfinite(value) else format(value, spec).replace("-", "−")


def inline_svg(svg: str, prefix: str, alt: str) -> str:
    """Turn the text of an SVG file into an element of the page, with `alt` as its description.

    The prologue and the fixed size are removed, and ids are made unique with `prefix`. The colours of ink, paper and
    controls are replaced by the page's colours, which change between light and dark mode.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = svg.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
    svg = svg.replace(ARM_COLOURS["control"].lower(), "var(--control)")
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    safe = require("markupsafe")
    return safe.Markup(f'{head} role="img" aria-label="{safe.escape(alt)}">{body}')


def spell_duration(seconds: float) -> str:
    """A duration in words: ``42 s``, ``3 min 5 s``, ``2 h 4 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"
