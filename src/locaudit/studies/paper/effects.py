"""What the edits of a study do: each arm's scores, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.location import parse_location
from locaudit.records import Arm, Method, TrialRecord
from locaudit.stats import (
    Design,
    MethodVerdict,
    compare_edits,
    decide,
    differ_too_little,
    holm,
    mean_score,
    monte_carlo_p,
    normal_tail_p,
    paired_interval,
    rank_correlation,
    reaches,
    t_test_p,
)
from locaudit.stats.selection import Place
from locaudit.studies.paper.study import SCORE, Audit, Study

METRICS = ("truth", "info", "info_truth", "info_truth_probability", "info_truth_both", "mc1", "mc2", "mc3")
"""Scores on the test questions that every trial has."""
_UNGRADED = Design(graded=False)


def trial_scores(record: TrialRecord) -> dict[str, Any]:
    """A trial: hyperparameter, test scores, drift."""
    measured = record.metrics.get("test", {})
    return {
        "hyperparameter": record.spec.hyperparameter,
        **{name: measured.get(name) for name in METRICS},
        "kl": record.drift.get("kl"),
        "ce": record.drift.get("ce"),
    }


def _place(audit: Audit, records: Sequence[TrialRecord], chosen: TrialRecord | None) -> dict[str, Any]:
    """A location: its trials, the one chosen on validation, and the best on test, which the paper may mean."""
    found = [r.metrics["test"].get(SCORE, math.nan) for r in records if r.status == "ok"]
    known = [x for x in found if not math.isnan(x)]
    return {
        "location": records[0].spec.location,
        "chosen": None if chosen is None else trial_scores(chosen),
        "best_on_test": max(known) if known else None,
        "n_diverged": sum(r.status != "ok" for r in records),
        "trials": [trial_scores(r) for r in records if r.status == "ok"],
    }


def _places(audit: Audit, method: Method) -> dict[str, Any]:
    chosen, places = audit.chosen(method), audit.places(method)
    found = {place: _place(audit, records, chosen[place]) for place, records in places.items()}
    return {
        "localized": found["claim", -1],
        "whole": found.get(("whole", -1)),
        "random": [block for (arm, _), block in found.items() if arm == "control"],
    }


def measure_method(study: Study, method: Method) -> dict[str, Any]:
    """A method at the localized heads, the random sets and the whole model, and how they compare."""
    audit, margin = study.sets, study.config.margin
    verdict = decide(audit.records, score=SCORE, level=study.config.level, design=_UNGRADED).methods[method]
    blocks = _places(audit, method)
    controls = np.asarray(verdict.controls)
    best = blocks["localized"]["best_on_test"], [block["best_on_test"] for block in blocks["random"]]
    chosen = audit.chosen(method)
    random = [record for (arm, _), record in sorted(chosen.items()) if arm == "control"]
    references: dict[str, Place] = {"against_localized": ("claim", -1), "against_whole": ("whole", -1)}
    for name, place in references.items():
        found = [_match(audit.values, record, audit.values(chosen[place]), margin) for record in random]
        for block, match in zip(blocks["random"], _with_holm(found), strict=True):
            block[name] = match
    return {
        "grid": list(audit.config.iti.alphas if method == "iti" else audit.config.optimal.strengths),
        "n_random": len(controls),
        "n_random_diverged": sum(record is None for record in random),
        **_versus_random(verdict, _few_of(audit, chosen, SCORE, margin)),
        "outcome": verdict.outcome,
        "random_mean": _nan_free(np.nanmean, controls),
        "random_sd": _nan_free(lambda x: np.nanstd(x, ddof=1), controls),
        "random_matching": _count(blocks["random"], "against_localized", study.config.level),
        "random_matching_whole": _count(blocks["random"], "against_whole", study.config.level),
        "best_on_test": {
            "localized": best[0],
            "random": best[1],
            "p_monte_carlo": monte_carlo_p(_number(best[0]), [_number(x) for x in best[1]]),
            "p_t_test": t_test_p(_number(best[0]), [_number(x) for x in best[1]]),
            "p_normal_tail": normal_tail_p(_number(best[0]), [_number(x) for x in best[1]]),
        },
        "truth_gains": _truth_gains(audit, method, margin),
        **blocks,
    }


def _few_of(audit: Audit, chosen: Mapping[Place, TrialRecord | None], score: str, margin: float) -> bool:
    """Whether too few questions tell the localized heads from the random sets."""
    random = [audit.values(record, score) for (arm, _), record in chosen.items() if arm == "control"]
    return differ_too_little(audit.values(chosen["claim", -1], score), random, margin)


def _versus_random(verdict: MethodVerdict, few: bool) -> dict[str, Any]:
    return {
        "localized_score": verdict.claim,
        "random_scores": list(verdict.controls),
        "n_at_least": verdict.n_at_least,
        "worst_missing": verdict.worst_missing,
        "p_monte_carlo": verdict.p_value,
        "p_smallest": 1 / (1 + len(verdict.controls)),
        "p_t_test": t_test_p(verdict.claim, verdict.controls),
        "p_normal_tail": normal_tail_p(verdict.claim, verdict.controls),
        "effect": {
            "difference": verdict.effect, "interval_95": verdict.effect_interval, "p": verdict.effect_p
        },
        "gap": {"difference": verdict.gap, "interval_95": verdict.gap_interval, "few": few},
    }  # fmt: skip


def _truth_gains(audit: Audit, method: Method, margin: float) -> dict[str, Any]:
    """What chosen edits gain in Truth on the unedited model; the paper says that ITI at random sets hardly does."""
    base = audit.values(audit.base, "truth")

    def gain(record: TrialRecord | None) -> dict[str, Any]:
        values = audit.values(record, "truth")
        known = not np.isnan(mean_score(values))
        interval = paired_interval(values, base) if known else (math.nan, math.nan)
        few = differ_too_little(values, [base], margin)
        return {"difference": float(mean_score(values) - mean_score(base)), "interval_95": interval, "few": few}

    chosen = audit.chosen(method)
    random = [gain(record) for (arm, _), record in sorted(chosen.items()) if arm == "control"]
    bounds = [row["interval_95"] for row in random if not row["few"]]
    gains = [row["difference"] for row in random]
    return {
        "localized": gain(chosen["claim", -1]),
        "random": random,
        "random_median": _nan_free(np.nanmedian, np.asarray(gains)),
        "n_noticeable": sum(low > 0 or high < 0 for low, high in bounds),
        "n_within_margin": sum(-margin < low and high < margin for low, high in bounds),
    }


def measure_gain(
    audit: Audit, first: tuple[Method, Arm], second: tuple[Method, Arm] | None, margin: float
) -> dict[str, Any]:
    """Score of one arm's chosen edit minus that of another's, or of the unedited model."""
    record, reference = (audit.base if arm is None else audit.chosen(arm[0])[arm[1], -1] for arm in (first, second))
    return _match(audit.values, record, audit.values(reference), margin)


def _match(
    values: Callable[[TrialRecord | None], NDArray[np.float64]],
    record: TrialRecord | None,
    reference: NDArray[np.float64],
    margin: float,
) -> dict[str, Any]:
    """An edit against a reference's values; one that diverged is worse than any that did not."""
    match = compare_edits(values(record), reference, margin=margin)
    has_reference = not np.isnan(mean_score(reference))
    return {
        "difference": match.difference,
        "interval_90": match.interval,
        "few": match.few,
        "p_worse_by_margin": match.p,
        "outcome": "worse" if record is None and has_reference else match.outcome,
    }


def _with_holm(matches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    adjusted = holm([match["p_worse_by_margin"] for match in matches])
    return [{**match, "p_holm": p} for match, p in zip(matches, adjusted, strict=True)]


def _count(rows: Sequence[dict[str, Any]], name: str, level: float) -> dict[str, int]:
    """How many places match (are not worse by more than the margin), are worse, or cannot be told."""
    outcomes = [row[name]["outcome"] for row in rows]
    return {
        "match": outcomes.count("not worse"),
        "match_holm": sum(row[name]["p_holm"] <= level for row in rows),
        "worse": outcomes.count("worse"),
        "undecided": outcomes.count("undecided"),
    }


def _nan_free(statistic: Callable[[NDArray[np.float64]], Any], values: NDArray[np.float64]) -> float:
    return float(statistic(values)) if np.isfinite(values).sum() > 1 else math.nan


def measure_single(study: Study) -> dict[str, Any]:
    """Random single heads, and the best probed one, against the localized heads and the whole model."""
    audit, sets, margin = study.audits["single"], study.sets, study.config.margin
    accuracy = np.asarray(audit.probes["val_accuracy"])
    ranks = {head: n for n, head in enumerate(_ranking(accuracy), start=1)}
    chosen, blocks = audit.chosen("optimal"), _places(audit, "optimal")
    records = [record for _, record in sorted(chosen.items())]  # the claim first, then the controls by number
    references = {
        "against_localized": sets.values(sets.chosen("optimal")["claim", -1]),
        "against_whole": sets.values(sets.chosen("optimal")["whole", -1]),
    }
    rows: list[dict[str, Any]] = []
    for block, record in zip([blocks["localized"], *blocks["random"]], records, strict=True):
        ((layer, head),) = parse_location(block["location"]).units
        rows.append(
            {
                "head": f"{layer}.{head}",
                "val_accuracy": float(accuracy[layer, head]),
                "probe_rank": ranks[layer, head],
                "score": float(mean_score(audit.values(record))),
                **block,
            }
        )
    for name, reference in references.items():
        found = [_match(audit.values, record, reference, margin) for record in records]
        rows[0][name] = {**found[0], "p_holm": None}
        for row, match in zip(rows[1:], _with_holm(found[1:]), strict=True):
            row[name] = match
    best, random = rows[0], rows[1:]
    matching = [row for row in random if row["against_localized"]["p_holm"] <= study.config.level]
    localized, whole = (float(mean_score(values)) for values in references.values())
    k = study.config.probe.top_k
    return {
        "rule": (
            f"a head matches if the 90 % bootstrap interval of its score minus the other's, over the same test "
            f"questions, lies above -{margin:g}; it is worse if it lies below; else, or where too few questions "
            "differ, it cannot be told. Where a claim needs several or any of many to match, their tests are corrected "
            "by Holm's method"
        ),
        "n_random": len(random),
        "localized_score": localized,
        "whole_score": whole,
        "matching": _count(random, "against_localized", study.config.level),
        "matching_whole": _count(random, "against_whole", study.config.level),
        "n_at_least_localized": int(np.sum(reaches([row["score"] for row in random], localized))),
        "matching_heads": [row["head"] for row in matching],
        "matching_val_accuracy": [row["val_accuracy"] for row in matching],
        "matching_probe_rank": [row["probe_rank"] for row in matching],
        "n_random_among_probed": sum(row["probe_rank"] <= k for row in random),
        "best_probed": best,
        "random": random,
        "p_monte_carlo_best_probed": monte_carlo_p(best["score"], [row["score"] for row in random]),
    }


def _ranking(accuracy: np.ndarray) -> list[tuple[int, int]]:
    """Heads by probe accuracy, ties by (layer, head)."""
    heads = [(layer, head) for layer in range(accuracy.shape[0]) for head in range(accuracy.shape[1])]
    return sorted(heads, key=lambda at: (-accuracy[at], at))


def measure_multiple_choice(audit: Audit, method: Method, margin: float) -> dict[str, Any]:
    """MC2 of localized and random heads, and what KL it costs; hyperparameters chosen by MC2 on validation."""
    verdict, chosen = decide(audit.records, score="mc2", design=_UNGRADED).methods[method], audit.chosen(method, "mc2")
    localized = chosen["claim", -1]
    random = [record for (arm, _), record in sorted(chosen.items()) if arm == "control"]
    base = audit.values(audit.base, "mc2")
    return {
        **_versus_random(verdict, _few_of(audit, chosen, "mc2", margin)),
        "localized_kl": None if localized is None else localized.drift["kl"],
        "over_unedited": _match(lambda record: audit.values(record, "mc2"), localized, base, margin),
        # A random set whose edits all diverged counts as better.
        "n_random_better_in_both": None
        if localized is None
        else sum(record is None or _is_better(record, localized) for record in random),
        "n_random_worse_in_both": None
        if localized is None
        else sum(record is not None and _is_better(localized, record) for record in random),
    }


def _is_better(one: TrialRecord, other: TrialRecord) -> bool:
    """As high an MC2 for as little KL."""
    return one.metrics["test"]["mc2"] >= other.metrics["test"]["mc2"] and one.drift["kl"] <= other.drift["kl"]


def compare_leads(audit: Audit, margin: float) -> dict[str, Any]:
    """Lead of the localized heads over the mean random set in MC2, under ITI minus under optimal edits."""
    leads = []
    for method in ("iti", "optimal"):
        chosen = audit.chosen(method, "mc2")
        values = {place: audit.values(record, "mc2")[0] for place, record in chosen.items() if record is not None}
        random = [x for (arm, _), x in values.items() if arm == "control"]
        if ("claim", -1) not in values or not random:
            return {"difference": None, "interval_95": [None, None], "few": True}
        leads.append(values["claim", -1] - np.mean(random, axis=0))
    difference = float(np.mean(leads[0]) - np.mean(leads[1]))
    few = differ_too_little(leads[0], [leads[1]], margin)
    return {"difference": difference, "interval_95": paired_interval(leads[0], leads[1]), "few": few}


def measure_probe_effect(audit: Audit) -> dict[str, Any]:
    """Rank correlation of probe accuracy and effect of the optimal edit over single heads, tau chosen by the metric."""
    accuracy, out = np.asarray(audit.probes["val_accuracy"]), {}
    for score in (SCORE, "truth", "mc2"):
        base = float(mean_score(audit.values(audit.base, score)))
        x, y, names = [], [], []
        for record in audit.chosen("optimal", score).values():
            if record is not None:
                ((layer, head),) = parse_location(record.spec.location).units
                names.append(f"{layer}.{head}")
                x.append(float(accuracy[layer, head]))
                y.append(float(mean_score(audit.values(record, score))) - base)
        rho, p = rank_correlation(x, y)
        out[score] = {"n": len(x), "spearman": rho, "p": p, "heads": names, "val_accuracy": x, "effects": y}
    return out


def measure_landscape(study: Study) -> dict[str, Any] | None:
    """Effect of the optimal edit at every head, layers x heads."""
    audit = study.audits.get("landscape")
    if audit is None:
        return None
    shape = (audit.run["n_layers"], audit.run["n_heads"])
    accuracy = np.asarray(audit.probes["val_accuracy"])
    out: dict[str, Any] = {"tau": audit.config.optimal.strengths[0], "n": 0}
    for score in (SCORE, "truth", "mc2", "reward_accuracy"):
        base = float(mean_score(audit.values(audit.base, score)))
        effects = np.full(shape, np.nan)
        for record in audit.chosen("optimal", score).values():
            if record is not None:
                ((layer, head),) = parse_location(record.spec.location).units
                effects[layer, head] = float(mean_score(audit.values(record, score))) - base
        rho, p = rank_correlation(accuracy.ravel().tolist(), effects.ravel().tolist())
        out["n"] = int(np.isfinite(effects).sum())
        out[score] = {"spearman": rho, "p": p, "effects": effects.tolist()}
    return out


def _number(value: float | None) -> float:
    return math.nan if value is None else value
