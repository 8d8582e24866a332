"""A run for a paper: its verdict as a table in LaTeX or Markdown, and a paragraph that says what was done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from locaudit.report.tables import Tables
from locaudit.stats.phrases import short, short_interval, short_p, where
from locaudit.stats.scores import find_score
from locaudit.stats.verdict import MethodVerdict
from locaudit.text import plural

Format = Literal["latex", "markdown"]
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    x: rf"\{x}" for x in "&%$#_{}"
}


def write_up(tables: Tables, form: Format) -> str:
    """The table of a verdict, one row for each method and null, and the paragraph, as text."""
    rows = [row for method in tables.verdict.methods.values() for row in _rows(method)]
    heads = ("edit", "unedited", "claim [gain]", "whole model", "random places", "as good", "p", "lead", "outcome")
    if form == "markdown":
        lines = [heads, ["---"] * len(heads), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{paragraph(tables)}\n"
    body = "\n".join(_latex_line(row) for row in rows)
    return (
        "% needs \\usepackage{booktabs}\n"
        f"\\begin{{tabular}}{{lrrrlrrrl}}\n\\toprule\n{_latex_line(heads)}\n\\midrule\n{body}\n\\bottomrule\n"
        f"\\end{{tabular}}\n\n{_escape(paragraph(tables))}\n"
    )


def paragraph(tables: Tables) -> str:
    """What was done, in sentences that a paper can quote."""
    v, m = tables.verdict, tables.manifest
    n, size, titles = m.n_questions, len(m.claim), ", ".join(facts.title for facts in m.methods.values())
    place = plural(size, m.kind_plural.removesuffix("s"))
    one = m.kind_plural if size == 1 else f"sets of {place}"
    places = [f"{plan.n_planned} random {one}{where(name)}" for name, plan in m.nulls.items()]
    has_grid = any(facts.n_strengths > 1 for facts in m.methods.values())
    sentences = [
        f"With locaudit {m.versions['locaudit']}, we audited the claim that {m.behaviour} is localized at "
        f"{place} ({m.claim}; {m.claim_source}) of {m.model} ({m.dtype}).",
        f"Edits ({titles}) were found with the same settings at the claim, in the whole model, and at "
        f"{' and '.join(places)}, from at most {plural(n['train'], 'training question')}.",
        f"They were scored on {plural(n['test'], 'held-out question')} by the {find_score(v.score).title}.",
        f"Strengths were chosen on {plural(n['val'], 'validation question')}." if has_grid else "",
        *(f"{aspect.capitalize()} was judged by {judge.name}." for aspect, judge in m.judges.items()),
        "The p-value of a null is (1 + number of its places at least as good) / (1 + number of its places), the level "
        f"{v.level:g}. Intervals are 95 % intervals: of gains over questions, of leads over questions and places.",
        v.headline,
        f"Seed {tables.config.seed}; torch {m.versions['torch']}, transformers {m.versions['transformers']}.",
    ]
    return " ".join(filter(None, sentences))


def _rows(method: MethodVerdict) -> list[list[str]]:
    gain, whole = short_interval(method.effect_interval), method.whole_model
    own = [method.title, short(method.base), f"{short(method.claim)} {gain}", "" if whole is None else short(whole)]
    rows = [
        [
            where(null.name).strip() or "anywhere",
            f"{null.n_at_least} of {null.n_used}",
            short_p(null.p_value),
            f"{short(null.lead, 2, '+')} {short_interval(null.lead_interval)}",
        ]
        for null in method.nulls.values()
    ] or [[""] * 4]
    return [
        [*(own if number == 0 else [""] * len(own)), *row, method.outcome if number == 0 else ""]
        for number, row in enumerate(rows)
    ]


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(_escape, cells)) + r" \\"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(x, x) for x in text)
