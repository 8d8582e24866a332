"""The study's claims and single heads as CSV and Markdown files; each audit's folder has the tables of its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from locaudit.report.tables import csv_text

Numbers = Mapping[str, Any]
_CHOSEN = ("hyperparameter", "truth", "info", "mc1", "mc2", "kl", "ce")


def tables(n: Numbers, specification: Sequence[Numbers]) -> dict[str, str]:
    """File name -> text: the claims (CSV and Markdown), what survives other choices, and the single heads."""
    lines = ["| The paper says | Here | Measured | p (Holm) |", "|---|---|---|---|"]
    for c in n["claims"]:
        flags = c["flags"] and f"flags: {', '.join(c['flags'])}"
        more = "; ".join(dict.fromkeys(filter(None, (c["measured"], c["open"], c["size"], flags))))
        row = f"| {c['says']} | **{c['outcome']}** | {c['estimand']}: {more} | {c['p_holm']:.2g} |"
        lines.append(row.replace("*T", "\\*T"))
    lists = ("matching", "flags")
    claims = [{**c, **{key: " ".join(map(str, c[key])) for key in lists}} for c in n["claims"]]
    found = {"claims.csv": csv_text(claims), "specification.csv": csv_text(specification)}
    if n["single"]:
        heads = [("best probed", n["single"]["best_probed"]), *(("random", row) for row in n["single"]["random"])]
        found["single_heads.csv"] = csv_text([{"arm": arm} | _head(row) for arm, row in heads])
    return {**found, "claims.md": "\n".join(lines) + "\n"}


def _head(row: Numbers) -> dict[str, Any]:
    known = {key: row[key] for key in ("head", "val_accuracy", "probe_rank", "score")}
    return known | {key: (row["chosen"] or {}).get(key) for key in _CHOSEN}
