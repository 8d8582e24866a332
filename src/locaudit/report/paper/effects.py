"""What the edits of a study do: each arm's scores, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from locaudit.locations import parse_location
from locaudit.records import Arm, Method, TrialRecord
from locaudit.report.paper.study import SCORE, Audit, Study
from locaudit.stats import (
    Match,
    MethodVerdict,
    compare_edits,
    decide,
    holm,
    mean_score,
    monte_carlo_p,
    normal_tail_p,
    rank_correlation,
    t_test_p,
)

METRICS = ("truth", "info", "info_truth", "info_truth_probability", "info_truth_both", "mc1", "mc2", "mc3")
"""Scores on the test questions that every trial has."""


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
    verdict = decide(audit.records, score=SCORE, level=study.config.level).methods[method]
    blocks = _places(audit, method)
    controls = np.asarray(verdict.controls)
    best = blocks["localized"]["best_on_test"], [block["best_on_test"] for block in blocks["random"]]
    chosen = audit.chosen(method)
    matches = [
        compare_edits(audit.values(record), audit.values(chosen["claim", -1]), margin=margin)
        for (arm, _), record in sorted(chosen.items())
        if arm == "control"
    ]
    for block, match in zip(blocks["random"], matches, strict=True):
        block["against_localized"] = _match(match)
    return {
        "grid": list(audit.config.iti.alphas if method == "iti" else audit.config.optimal.strengths),
        "n_random": len(controls),
        **_versus_random(verdict),
        "outcome": verdict.outcome,
        "random_mean": float(np.nanmean(controls)),
        "random_sd": float(np.nanstd(controls, ddof=1)),
        "random_matching": {
            outcome: sum(m.outcome == outcome for m in matches) for outcome in ("matches", "falls short", "undecided")
        },
        "best_on_test": {
            "localized": best[0],
            "random": best[1],
            "p_monte_carlo": monte_carlo_p(_number(best[0]), [_number(x) for x in best[1]]),
            "p_t_test": t_test_p(_number(best[0]), [_number(x) for x in best[1]]),
            "p_normal_tail": normal_tail_p(_number(best[0]), [_number(x) for x in best[1]]),
        },
        "random_gaining_truth": _gaining_truth(audit, method),
        **blocks,
    }


def _versus_random(verdict: MethodVerdict) -> dict[str, Any]:
    return {
        "localized_score": verdict.claim,
        "random_scores": list(verdict.controls),
        "n_at_least": verdict.n_at_least,
        "p_monte_carlo": verdict.p_value,
        "p_smallest": 1 / (1 + len(verdict.controls)),
        "p_t_test": t_test_p(verdict.claim, verdict.controls),
        "p_normal_tail": normal_tail_p(verdict.claim, verdict.controls),
        "effect": {
            "difference": verdict.effect, "interval_95": verdict.effect_interval, "p": verdict.effect_p
        },
        "gap": {"difference": verdict.gap, "interval_95": verdict.gap_interval},
    }  # fmt: skip


def _gaining_truth(audit: Audit, method: Method) -> dict[str, Any]:
    """Random sets whose chosen edit gains Truth on the unedited model: the paper says that under ITI few do."""
    base = audit.base.metrics["test"]["truth"]
    gains = [
        math.nan if record is None else record.metrics["test"].get("truth", math.nan) - base
        for (arm, _), record in sorted(audit.chosen(method).items())
        if arm == "control"
    ]
    localized = audit.chosen(method)["claim", -1]
    return {
        "gains": gains,
        "median": float(np.nanmedian(gains)),
        "localized": math.nan if localized is None else localized.metrics["test"].get("truth", math.nan) - base,
    }


def measure_gain(
    audit: Audit, first: tuple[Method, Arm], second: tuple[Method, Arm] | None, margin: float
) -> dict[str, Any]:
    """Score of one arm's chosen edit minus that of another's, or of the unedited model."""
    records = [audit.base if arm is None else audit.chosen(arm[0])[arm[1], -1] for arm in (first, second)]
    return _match(compare_edits(*map(audit.values, records), margin=margin))


def _match(match: Match) -> dict[str, Any]:
    return {
        "difference": match.difference,
        "interval_90": match.interval,
        "p_worse_by_margin": match.p,
        "outcome": match.outcome,
    }


def measure_single(study: Study) -> dict[str, Any]:
    """Random single heads, and the best probed one, against the localized heads and the whole model."""
    audit, sets, margin = study.audits["single"], study.sets, study.config.margin
    accuracy = np.asarray(audit.probes["val_accuracy"])
    ranks = {head: n for n, head in enumerate(_ranking(accuracy), start=1)}
    chosen, blocks = audit.chosen("optimal"), _places(audit, "optimal")
    localized = sets.values(sets.chosen("optimal")["claim", -1])
    whole = sets.values(sets.chosen("optimal")["whole", -1])
    rows = []
    for place, block in (
        (("claim", -1), blocks["localized"]),
        *((("control", n), b) for n, b in enumerate(blocks["random"])),
    ):
        ((layer, head),) = parse_location(block["location"]).units
        values = audit.values(chosen[place])  # type: ignore[index]
        found = {"against_localized": localized, "against_whole": whole}
        matches = {name: compare_edits(values, reference, margin=margin) for name, reference in found.items()}
        rows.append(
            {
                "head": f"{layer}.{head}",
                "val_accuracy": float(accuracy[layer, head]),
                "probe_rank": ranks[layer, head],
                "score": float(mean_score(values)),
                **{name: _match(match) for name, match in matches.items()},
                **block,
            }
        )
    best, random = rows[0], rows[1:]
    adjusted = holm([row["against_localized"]["p_worse_by_margin"] for row in random])
    for row, p in zip(random, adjusted, strict=True):
        row["p_holm"] = p
    matching = [row for row in random if row["p_holm"] <= study.config.level]
    reference = float(mean_score(localized))
    return {
        "rule": (
            f"a head matches if the 90 % bootstrap interval of its score minus the localized heads', over the same "
            f"test questions, lies above -{margin:g}; it falls short if it lies below; else the questions are too few "
            "to tell. For the claim that several match, the heads' tests are corrected by Holm's method"
        ),
        "n_random": len(random),
        "localized_score": reference,
        "whole_score": float(mean_score(whole)),
        "n_match": sum(row["against_localized"]["outcome"] == "matches" for row in random),
        "n_match_holm": len(matching),
        "n_fall_short": sum(row["against_localized"]["outcome"] == "falls short" for row in random),
        "n_undecided": sum(row["against_localized"]["outcome"] == "undecided" for row in random),
        "n_at_least_localized": sum(row["score"] >= reference for row in random),
        "n_match_whole": sum(row["against_whole"]["outcome"] == "matches" for row in random),
        "matching_heads": [row["head"] for row in matching],
        "matching_val_accuracy": [row["val_accuracy"] for row in matching],
        "matching_probe_rank": [row["probe_rank"] for row in matching],
        "best_probed": best,
        "random": random,
        "p_monte_carlo_best_probed": monte_carlo_p(best["score"], [row["score"] for row in random]),
    }


def _ranking(accuracy: np.ndarray) -> list[tuple[int, int]]:
    """Heads by probe accuracy, ties by (layer, head)."""
    heads = [(layer, head) for layer in range(accuracy.shape[0]) for head in range(accuracy.shape[1])]
    return sorted(heads, key=lambda at: (-accuracy[at], at))


def measure_multiple_choice(audit: Audit, method: Method) -> dict[str, Any]:
    """MC2 of localized and random heads, and what KL it costs; hyperparameters chosen by MC2 on validation."""
    verdict = decide(audit.records, score="mc2").methods[method]
    localized = audit.chosen(method, "mc2")["claim", -1]
    dominating = 0
    if localized is not None:
        mc2, kl = localized.metrics["test"]["mc2"], localized.drift["kl"]
        dominating = sum(
            any(r.status == "ok" and r.metrics["test"]["mc2"] >= mc2 and r.drift["kl"] <= kl for r in records)
            for (arm, _), records in audit.places(method).items()
            if arm == "control"
        )
    return {
        **_versus_random(verdict),
        "localized_kl": None if localized is None else localized.drift["kl"],
        "n_random_with_as_much_for_less_kl": dominating,
    }


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
