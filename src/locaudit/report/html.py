"""Render self-contained HTML pages from templates of the package, with every text escaped.

A page holds its style sheet, its data as one JSON value, Plotly and our own script. A content security policy allows
these two scripts, by their hashes, and nothing else.
"""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from html import escape
from importlib import resources
from statistics import fmean
from typing import Any

from locaudit.location import short_location
from locaudit.records import finite
from locaudit.report.style import aspect_words, require, score_phrase, score_title
from locaudit.report.tables import place_name, reading_words
from locaudit.stats.phrases import where
from locaudit.stats.scores import THRESHOLD, named_score
from locaudit.text import readable

MISSING = "–"
"""Shown where nothing was measured."""
SCRIPTS = ("plotly/plotly-basic.min.js", "page.js")
"""Plotly (https://github.com/plotly/plotly.js, MIT license) and our own script."""
_HERE = "<!-- scripts -->"
"""Where data and scripts stand in a page. Texts cannot hold it, since they are escaped."""


def render(template: str, data: Mapping[str, Any] | None = None, **values: Any) -> str:
    """Render a template, given by its path within the package. Texts in `values` are escaped and made `readable`.

    `data` is what the page's script reads: tables, charts and answers (`locaudit.report.page`).
    """
    require("jinja2")
    scripts = [resources.files("locaudit.report").joinpath(name).read_text("utf-8") for name in SCRIPTS]
    hashes = [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    page = environment().get_template(template).render(values, data=data, hashes=hashes)
    tail = "".join(f"<script>{script}</script>\n" for script in scripts)
    return page.replace(_HERE, f'<script type="application/json" id="data">{embed(data or {})}</script>\n{tail}')


def embed(value: Any) -> str:
    """A value as JSON that cannot end a script element. Texts are made `readable`; NaN and infinity become null."""
    shown, of_numpy = finite(value, readable), lambda x: finite(x.item())
    text = json.dumps(shown, default=of_numpy, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("&", "\\u0026")


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
        "signed": lambda q, x: markup(number(x, f"+.{decimals(q.interval)}f")),
        "commands": lambda text: markup(re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))),
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


def decimals(interval: tuple[float, float]) -> int:
    """How many decimals show two digits of an interval's half width: 2 for [1.74, 2.20]; 2 without an interval."""
    half = (interval[1] - interval[0]) / 2
    return min(max(0, 1 - math.floor(math.log10(half))), 6) if half > 0 and math.isfinite(half) else 2


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
