"""The study's numbers as CSV files, for readers who would rather do their own statistics."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Numbers = Mapping[str, Any]
_TRIAL = (
    "hyperparameter", "truth", "info", "info_truth", "info_truth_probability", "info_truth_both", "mc1", "mc2", "mc3",
    "kl", "ce",
)  # fmt: skip


def tables(n: Numbers, claims: Sequence[Numbers]) -> dict[str, str]:
    """File name -> text: every trial, places with their chosen edits, single heads, probes, claims (twice)."""
    return {
        "trials.csv": _csv(["part", "method", "arm", "location", "chosen", *_TRIAL], _trials(n)),
        "places.csv": _csv(
            ["method", "arm", "location", *_TRIAL, "best_on_test", "difference", "low_90", "high_90", "outcome"],
            _rows(n),
        ),
        "single_heads.csv": _csv(
            ["arm", "head", "val_accuracy", "probe_rank", *_TRIAL, "difference", "low_90", "high_90", "outcome"],
            _heads(n),
        ),
        "probes.csv": _csv(["layer", "head", "val_accuracy", "localized"], _probes(n)),
        "claims.csv": _csv(
            ["name", "section", "says", "rule", "measured", "outcome"],
            ([claim[key] for key in ("name", "section", "says", "rule", "measured", "outcome")] for claim in claims),
        ),
        "claims.md": _markdown(claims),
    }


def _places(n: Numbers) -> Iterator[tuple[str, str, str, Numbers]]:
    """(part, method, arm, place)."""
    for method in ("iti", "optimal"):
        yield "sets", method, "localized", n[method]["localized"]
        if n[method]["whole"]:
            yield "sets", method, "whole", n[method]["whole"]
        for block in n[method]["random"]:
            yield "sets", method, "random", block
    yield "single", "optimal", "best probed", n["single"]["best_probed"]
    for block in n["single"]["random"]:
        yield "single", "optimal", "random", block


def _trials(n: Numbers) -> Iterator[list[object]]:
    yield ["sets", "none", "unedited", "", "true", *(n["base"][key] for key in _TRIAL)]
    for part, method, arm, block in _places(n):
        chosen = (block["chosen"] or {}).get("hyperparameter")
        for trial in block["trials"]:
            is_chosen = "true" if trial["hyperparameter"] == chosen else "false"
            yield [part, method, arm, block["location"], is_chosen, *(trial[key] for key in _TRIAL)]


def _rows(n: Numbers) -> Iterator[list[object]]:
    for part, method, arm, block in _places(n):
        if part == "sets":
            yield [method, arm, block["location"], *_chosen(block), block["best_on_test"], *_match(block)]


def _heads(n: Numbers) -> Iterator[list[object]]:
    for arm, row in (("best probed", n["single"]["best_probed"]), *(("random", r) for r in n["single"]["random"])):
        yield [arm, row["head"], row["val_accuracy"], row["probe_rank"], *_chosen(row), *_match(row)]


def _probes(n: Numbers) -> Iterator[list[object]]:
    localized = {row["head"] for row in n["setup"]["localized"]}
    for layer, row in enumerate(n["setup"]["probes"]["val_accuracy"]):
        for head, accuracy in enumerate(row):
            yield [layer, head, accuracy, "true" if f"{layer}.{head}" in localized else "false"]


def _chosen(block: Numbers) -> list[object]:
    return [(block["chosen"] or {}).get(key) for key in _TRIAL]


def _match(block: Numbers) -> list[object]:
    found = block.get("against_localized")
    return ["", "", "", ""] if found is None else [found["difference"], *found["interval_90"], found["outcome"]]


def _csv(header: Sequence[str], rows: Iterator[list[object]] | Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None or cell != cell else cell for cell in row] for row in rows])
    return text.getvalue()


def _markdown(claims: Sequence[Numbers]) -> str:
    lines = ["| The paper says | Measured here | |", "|---|---|---|"]
    lines += [
        f"| {claim['says']} | {claim['measured']} | **{claim['outcome']}** |".replace("*T", "\\*T") for claim in claims
    ]
    return "\n".join(lines) + "\n"
