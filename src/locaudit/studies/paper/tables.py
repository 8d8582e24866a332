"""The study's numbers as CSV files, for readers who want to compute their own statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from locaudit.report.tables import csv_text

Numbers = Mapping[str, Any]
_TRIAL = (
    "hyperparameter", "truth", "info", "info_truth", "info_truth_probability", "info_truth_both", "mc1", "mc2", "mc3",
    "kl", "ce",
)  # fmt: skip
_HEAD = ("head", "val_accuracy", "probe_rank")


def tables(n: Numbers, claims: Sequence[Numbers]) -> dict[str, str]:
    """File name -> text: trials, places with their chosen edits, single heads, probes, claims (CSV and Markdown)."""
    single, localized = n["single"], {row["head"] for row in n["setup"]["localized"]}
    heads = [("best probed", single["best_probed"]), *(("random", row) for row in single["random"])]
    probes = [
        {"layer": i, "head": j, "val_accuracy": x, "localized": "true" if f"{i}.{j}" in localized else "false"}
        for i, row in enumerate(n["setup"]["probes"]["val_accuracy"])
        for j, x in enumerate(row)
    ]
    lines = ["| The paper says | Measured here | |", "|---|---|---|"]
    lines += [f"| {c['says']} | {c['measured']} | **{c['outcome']}** |".replace("*T", "\\*T") for c in claims]
    sets = [(where, place) for part, where, place in _places(n) if part == "sets"]
    return {
        "trials.csv": csv_text(list(_trials(n))),
        "places.csv": csv_text([where | _chosen(place, "best_on_test") for where, place in sets]),
        "single_heads.csv": csv_text([{"arm": arm} | _pick(row, _HEAD) | _chosen(row) for arm, row in heads]),
        "probes.csv": csv_text(probes),
        "claims.csv": csv_text(claims),
        "claims.md": "\n".join(lines) + "\n",
    }


def _places(n: Numbers) -> Iterator[tuple[str, dict[str, Any], Numbers]]:
    """For each place: part of the study, columns that identify it, and what was measured there."""
    arms = [("sets", method, arm, arm) for method in ("iti", "optimal") for arm in ("localized", "whole", "random")]
    arms += [("single", "optimal", arm, arm.replace("_", " ")) for arm in ("best_probed", "random")]
    for part, method, arm, name in arms:
        found = n[method if part == "sets" else "single"][arm]
        for place in found if arm == "random" else [found]:
            yield part, {"method": method, "arm": name, "location": place["location"]}, place


def _trials(n: Numbers) -> Iterator[dict[str, Any]]:
    base = {"part": "sets", "method": "none", "arm": "unedited", "location": "", "chosen": "true"}
    yield base | _pick(n["base"], _TRIAL)
    for part, where, place in _places(n):
        chosen = (place["chosen"] or {}).get("hyperparameter")
        for trial in place["trials"]:
            is_chosen = "true" if trial["hyperparameter"] == chosen else "false"
            yield {"part": part, **where, "chosen": is_chosen} | _pick(trial, _TRIAL)


def _chosen(place: Numbers, *more: str) -> dict[str, Any]:
    """Columns for the chosen edit of a place and its comparison with the probed heads."""
    match = place.get("against_localized", {})
    low, high = match.get("interval_90", (None, None))
    compared = {"difference": match.get("difference"), "low_90": low, "high_90": high, "outcome": match.get("outcome")}
    return _pick(place["chosen"] or {}, _TRIAL) | _pick(place, more) | compared


def _pick(values: Numbers, keys: Sequence[str]) -> dict[str, Any]:
    return {key: values.get(key) for key in keys}
