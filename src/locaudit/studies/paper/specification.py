"""Every claim under every combination of choices that the records of a study allow.

What survives other choices? An analysis chooses a margin, a score and its threshold, a strength, a null and training
seeds. Each combination of them repeats the rule of a claim on the same trials, without a correction for several tests.
The rows share questions and edits: they show what a result depends on, and decide nothing. One judge, one model and one
split are not varied. Source: Simonsohn, Simmons and Nelson 2020, "Specification curve analysis".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from locaudit.stats.scores import GREEDY, has_score
from locaudit.studies.paper.claims import Rule, View, evaluate, parts_of
from locaudit.studies.paper.study import Study

Options = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Choice -> option -> the fields of a `View` that it sets. The first option is the one that decides."""
_MARGINS = (1 / 4, 1 / 2)
_JUDGED = ("info_truth_probability", "info_truth", "info_truth_both")


def options(study: Study) -> Options:
    """The choices that vary in a study."""
    base, questions = View.of(study), study.sets.base.record.questions["test"]
    scores = [name + ending for ending in ("", GREEDY) for name in _JUDGED]
    judged = dict.fromkeys([base.judged, *(name for name in scores if has_score(questions, name))])
    found: dict[str, dict[str, dict[str, Any]]] = {
        "margin": {f"{x:.2g}": {"margin": x} for x in dict.fromkeys((base.margin, *_MARGINS))},
        "judged score": {name: {"judged": name} for name in judged},
        "MC score": {name: {"mc": name} for name in ("mc2", "mc1")},
        "strength": {name: {"strength": name} for name in ("chosen", "lowest", "highest")},
        "null": {name: {"null": name} for name in study.sets.manifest.nulls},
    }
    seeds = {"all": {"seeds": base.seeds}}
    if len(base.seeds) > 1:
        seeds |= {str(i): {"seeds": (i,)} for i in base.seeds}
    return {**found, "seed": seeds}


def _varies(choice: str, rule: Rule, study: Study) -> bool:
    """Whether a claim can depend on a choice."""
    parts = parts_of(rule)
    grids = [{row.record.spec.hyperparameter for row in study.audits[x].rows} for x in parts if x in study.audits]
    return {
        "margin": rule.get("bound", 1) != 0,
        "judged score": rule["score"] != "mc2",
        "MC score": rule["score"] == "mc2",
        "strength": any(len(grid - {None}) > 1 for grid in grids),
        "null": "among" not in rule and (rule.get("method") == "optimal" or rule.get("places") == "sets"),
        "seed": "sets" in parts,
    }[choice]


def specify(study: Study) -> list[dict[str, Any]]:
    """A row for each claim and combination of choices, the deciding combination first.

    ``changed`` names the choice that differs from the deciding one: empty for none, None for several.
    """
    rows, level, every = [], float(study.rules["level"]), options(study)
    for rule in study.rules["claims"]:
        choices = {name: of for name, of in every.items() if _varies(name, rule, study)}
        for combination in product(*(of.items() for of in choices.values())):
            changes = {key: value for _, fields in combination for key, value in fields.items()}
            found = evaluate(rule, replace(View.of(study), **changes))
            names = dict.fromkeys(every, "") | dict(zip(choices, (option for option, _ in combination), strict=True))
            others = [choice for choice in choices if names[choice] != next(iter(choices[choice]))]
            changed = None if len(others) > 1 else "".join(others)
            told = {"estimate": found.estimate, "bound": found.bound, "p": found.p, "open": found.open}
            outcome = found.outcome(found.p, level)
            rows.append({"claim": rule["name"], "changed": changed, **names, **told, "outcome": outcome})
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Claim -> outcome -> number of combinations."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = found.setdefault(row["claim"], dict.fromkeys(("replicated", "not replicated", "open"), 0))
        counts[row["outcome"]] += 1
    return found
