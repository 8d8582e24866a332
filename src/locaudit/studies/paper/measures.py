"""Compute every number of the study as JSON-ready values: the content of ``numbers.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from locaudit.location import Location
from locaudit.records import TrialRecord
from locaudit.report import Tables
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
from locaudit.stats.words import MAX_MISSING
from locaudit.store.manifest import ProbeFacts
from locaudit.studies.paper.study import SCORE, Chosen, Study

METRICS = ("truth", "info", "info_truth", "info_truth_probability", "info_truth_both", "mc1", "mc2", "mc3")
"""Test scores that every trial of the study has."""
RELEASES: Mapping[tuple[int, int, int], str] = {
    (817, 2585, 3295): "TruthfulQA, first release (the hub's, and the one that fits the paper's number of pairs)",
    (817, 2835, 3367): "TruthfulQA, revision of October 2021 (the paper's number of pairs does not fit it)",
}
"""(questions, true answers, false answers) as loaded -> release of TruthfulQA."""


def data_release(questions: int, true: int, false: int) -> str:
    """The release of TruthfulQA that has these numbers of questions, true answers and false answers."""
    return RELEASES.get((questions, true, false), "not TruthfulQA as released, the paper's data")


def measure(study: Study) -> dict[str, Any]:
    """All numbers of a study, by section: setup, training, methods, gains, single heads, multiple choice and more."""
    margin, margin_mc, manifest = study.config.margin, study.config.margin_mc, study.sets.manifest
    iti, optimal = (Chosen(study.sets, method) for method in ("iti", "optimal"))
    arms = {
        "localized ITI": iti.records["claim", -1],
        "whole ITI": iti.records["whole", -1],
        "localized optimal": optimal.records["claim", -1],
        "whole optimal": optimal.records["whole", -1],
        "unedited": study.sets.base.record,
    }
    gains = {}
    for one, other in (
        ("whole optimal", "localized ITI"),
        ("localized optimal", "localized ITI"),
        ("localized optimal", "whole optimal"),
        ("localized ITI", "whole ITI"),
        ("localized ITI", "unedited"),
        ("localized optimal", "unedited"),
        ("whole optimal", "unedited"),
    ):
        gains[f"{one} over {other}"] = _match(iti, arms[one], iti.values(arms[other]), margin)
    by_mc2 = {method: Chosen(study.sets, method, "mc2") for method in ("iti", "optimal")}
    return {
        "setup": _setup(study),
        "training": _training(study),
        "base": trial_scores(study.sets.base.record),
        "iti": measure_method(iti, study, study.config.iti.alphas),
        "optimal": measure_method(optimal, study, study.config.optimal.strengths),
        "gains": gains,
        "single": measure_single(study, optimal),
        "multiple_choice": {
            **{method: measure_multiple_choice(chosen, margin_mc) for method, chosen in by_mc2.items()},
            "lead_under_iti_minus_optimal": compare_leads(by_mc2["iti"], by_mc2["optimal"], margin_mc),
        },
        "probe_effect": measure_probe_effect(study.audits["single"]),
        "landscape": measure_landscape(study.audits["landscape"]) if "landscape" in study.audits else None,
        "run": {
            "n_trials": {part: len(audit.rows) for part, audit in study.audits.items()},
            "seconds": {part: audit.seconds for part, audit in study.audits.items()},
            **{name: getattr(manifest, name) for name in ("device", "dtype", "threads", "versions", "fingerprint")},
        },
    }


def _setup(study: Study) -> dict[str, Any]:
    sets, config = study.sets, study.config
    run, shape, probes, data = sets.manifest, sets.manifest.shape, _probes(sets), sets.manifest.data
    accuracy, heads = probes.val_accuracy, sets.claimed_heads
    return {
        "model": run.model,
        **{name: getattr(shape, name) for name in ("n_layers", "n_heads", "head_dim")},
        "n_heads_in_all": shape.n_layers * shape.n_heads,
        "data": {
            "name": run.behaviour,
            "release": data_release(**data),
            **data,
            "true_a_question": data["true"] / data["questions"],
            "false_a_question": data["false"] / data["questions"],
        },
        "n_questions": run.n_questions,
        "judges": {aspect: judge.name for aspect, judge in sets.judges.items()},
        "score": SCORE,
        "margin": config.margin,
        "margin_mc": config.margin_mc,
        "max_missing": MAX_MISSING,
        "level": config.level,
        "seed": config.seed,
        "probes": {
            **{name: getattr(probes, name) for name in ("context", "n_train", "n_val", "majority")},
            "best": max(map(max, accuracy)),
            "val_accuracy": accuracy,
        },
        "localized": [{"head": f"{layer}.{head}", "val_accuracy": accuracy[layer][head]} for layer, head in heads],
        "n_localized": len(heads),
    }


def _training(study: Study) -> dict[str, Any]:
    settings, facts = study.config.optimal, _facts(study.sets)
    rates, single = facts.pop("learning_rate"), _facts(study.audits["single"])["learning_rate"]
    return {
        **{key: getattr(settings, key) for key in ("objective", "reduction", "reader")},
        "taus": list(settings.strengths),
        "epochs": settings.epochs,
        "schedule": "cosine",
        **facts,
        "learning_rate": {
            "whole model": rates["whole"],
            "localized heads": rates["claim"],
            "single head": single["claim"],
        },
    }


def trial_scores(record: TrialRecord) -> dict[str, Any]:
    """A trial's hyperparameter, test scores and drift (KL and cross-entropy, nats per token)."""
    measured = record.metrics.get("test", {})
    drift = {name: record.drift.get(name) for name in ("kl", "ce")}
    return {"hyperparameter": record.spec.hyperparameter, **{name: measured.get(name) for name in METRICS}, **drift}


def _places(chosen: Chosen) -> dict[str, Any]:
    """The places of a method, each with its trials, the trial chosen on validation, and the best score on test.

    The paper does not say on which questions it selects its best scores; the best on test is given in case it means
    that.
    """
    trials: dict[Any, list[TrialRecord]] = {}
    for row in chosen.audit.rows:
        if row.record.spec.method == chosen.method:
            trials.setdefault(row.place, []).append(row.record)
    blocks = {}
    for place, records in trials.items():
        ok = [record for record in records if record.status == "ok"]
        scores = [x for r in ok if not math.isnan(x := r.metrics["test"].get(SCORE, math.nan))]
        best = chosen.records[place]
        blocks[place] = {
            "location": str(records[0].spec.location),
            "chosen": None if best is None else trial_scores(best),
            "best_on_test": max(scores, default=None),
            "n_diverged": len(records) - len(ok),
            "trials": [trial_scores(record) for record in ok],
        }
    return {
        "localized": blocks["claim", -1],
        "whole": blocks.get(("whole", -1)),
        "random": [block for (arm, _), block in blocks.items() if arm == "control"],
    }


def measure_method(chosen: Chosen, study: Study, grid: Sequence[float]) -> dict[str, Any]:
    """One method: scores at the localized heads, random sets and whole model, and their comparisons.

    `grid` has the hyperparameters that were tried.
    """
    margin, level = study.config.margin, study.config.level
    verdict = _verdict(chosen, level)
    blocks, controls = _places(chosen), np.asarray(verdict.controls)
    for name, arm in (("against_localized", "claim"), ("against_whole", "whole")):
        _compare(blocks["random"], name, chosen, chosen.random, chosen.at(arm), margin)
    best, random = blocks["localized"]["best_on_test"], [block["best_on_test"] for block in blocks["random"]]
    numbers = _number(best), [_number(x) for x in random]
    return {
        "grid": list(grid),
        "n_random": len(controls),
        "n_random_diverged": sum(record is None for record in chosen.random),
        **_versus_random(verdict, chosen.few(margin)),
        "outcome": verdict.outcome,
        "random_mean": _nan_free(np.nanmean, controls),
        "random_sd": _nan_free(lambda x: np.nanstd(x, ddof=1), controls),
        "random_matching": _count(blocks["random"], "against_localized", level),
        "random_matching_whole": _count(blocks["random"], "against_whole", level),
        "best_on_test": {
            "localized": best,
            "random": random,
            "p_monte_carlo": monte_carlo_p(*numbers),
            "p_t_test": t_test_p(*numbers),
            "p_normal_tail": normal_tail_p(*numbers),
        },
        "truth_gains": _truth_gains(chosen, margin),
        **blocks,
    }


def _verdict(chosen: Chosen, level: float = 0.05) -> MethodVerdict:
    records = [row.record for row in chosen.audit.rows]
    return decide(records, score=chosen.score, level=level, design=Design(graded=False)).methods[chosen.method]


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
        "effect": {"difference": verdict.effect, "interval_95": verdict.effect_interval, "p": verdict.effect_p},
        "gap": {"difference": verdict.gap, "interval_95": verdict.gap_interval, "few": few},
    }


def _truth_gains(chosen: Chosen, margin: float) -> dict[str, Any]:
    """Gains of the chosen edits in Truth over the unedited model. In the paper, ITI at random sets hardly has any."""
    truth = Chosen(chosen.audit, chosen.method, "truth")  # only to read values: the edits are chosen by the main score
    base = truth.at("base")

    def gain(record: TrialRecord | None) -> dict[str, Any]:
        values = truth.values(record)
        known = not np.isnan(mean_score(values))
        return {
            "difference": float(mean_score(values) - mean_score(base)),
            "interval_95": paired_interval(values, base) if known else (math.nan, math.nan),
            "few": differ_too_little(values, [base], margin),
        }

    random = [gain(record) for record in chosen.random]
    bounds = [row["interval_95"] for row in random if not row["few"]]
    return {
        "localized": gain(chosen.records["claim", -1]),
        "random": random,
        "random_median": _nan_free(np.nanmedian, np.asarray([row["difference"] for row in random])),
        "n_noticeable": sum(low > 0 or high < 0 for low, high in bounds),
        "n_within_margin": sum(-margin < low and high < margin for low, high in bounds),
    }


def _match(chosen: Chosen, record: TrialRecord | None, reference: NDArray[np.float64], margin: float) -> dict[str, Any]:
    """Compare an edit with reference values. An edit that diverged is worse than any reference with a score."""
    match = compare_edits(chosen.values(record), reference, margin=margin)
    has_reference = not np.isnan(mean_score(reference))
    return {
        "difference": match.difference,
        "interval_90": match.interval,
        "few": match.few,
        "p_worse_by_margin": match.p,
        "outcome": "worse" if record is None and has_reference else match.outcome,
    }


def _compare(
    rows: Sequence[dict[str, Any]],
    name: str,
    chosen: Chosen,
    records: Sequence[TrialRecord | None],
    reference: NDArray[np.float64],
    margin: float,
) -> None:
    """Add to each row, under `name`, its edit's comparison with the reference, with a Holm-adjusted p over rows."""
    found = [_match(chosen, record, reference, margin) for record in records]
    adjusted = holm([match["p_worse_by_margin"] for match in found])
    for row, match, p in zip(rows, found, adjusted, strict=True):
        row[name] = {**match, "p_holm": p}


def _count(rows: Sequence[dict[str, Any]], name: str, level: float) -> dict[str, int]:
    """Number of places that match (not worse by more than the margin), are worse, or are undecided."""
    outcomes = [row[name]["outcome"] for row in rows]
    return {
        "match": outcomes.count("not worse"),
        "match_holm": sum(row[name]["p_holm"] <= level for row in rows),
        "worse": outcomes.count("worse"),
        "undecided": outcomes.count("undecided"),
    }


def measure_single(study: Study, sets: Chosen) -> dict[str, Any]:
    """Compare random single heads and the best probed head with the localized heads and the whole model."""
    margin, level = study.config.margin, study.config.level
    chosen = Chosen(study.audits["single"], sets.method)
    accuracy = np.asarray(_probes(chosen.audit).val_accuracy)
    ranking = sorted(np.ndindex(accuracy.shape), key=lambda at: (-accuracy[at], at))
    blocks = _places(chosen)
    places = sorted(chosen.records)  # the claim first, then controls by number
    records = [chosen.records[place] for place in places]
    heads = {row.place: row.record.spec.location for row in chosen.audit.rows}
    rows: list[dict[str, Any]] = []
    for place, block, record in zip(places, [blocks["localized"], *blocks["random"]], records, strict=True):
        at = _head(heads[place])
        rows.append(
            {
                "head": f"{at[0]}.{at[1]}",
                "val_accuracy": float(accuracy[at]),
                "probe_rank": 1 + ranking.index(at),
                "score": chosen.mean(record),
                **block,
            }
        )
    best, random = rows[0], rows[1:]
    localized, whole = sets.at("claim"), sets.at("whole")
    for name, reference in (("against_localized", localized), ("against_whole", whole)):
        best[name] = {**_match(chosen, records[0], reference, margin), "p_holm": None}
        _compare(random, name, chosen, records[1:], reference, margin)
    matching = [row for row in random if row["against_localized"]["p_holm"] <= level]
    scores, localized_score = [row["score"] for row in random], float(mean_score(localized))
    return {
        "rule": (
            f"a head matches if the 90 % bootstrap interval of its score minus the other's, over the same test "
            f"questions, lies above -{margin:g}; it is worse if it lies below; else, or where too few questions "
            "differ, it cannot be told. Where a claim needs several or any of many to match, their tests are corrected "
            "by Holm's method"
        ),
        "n_random": len(random),
        "localized_score": localized_score,
        "whole_score": float(mean_score(whole)),
        "matching": _count(random, "against_localized", level),
        "matching_whole": _count(random, "against_whole", level),
        "n_at_least_localized": int(np.sum(reaches(scores, localized_score))),
        "matching_heads": [row["head"] for row in matching],
        "matching_val_accuracy": [row["val_accuracy"] for row in matching],
        "matching_probe_rank": [row["probe_rank"] for row in matching],
        "n_random_among_probed": sum(row["probe_rank"] <= study.config.probe.top_k for row in random),
        "best_probed": best,
        "random": random,
        "p_monte_carlo_best_probed": monte_carlo_p(best["score"], scores),
    }


def measure_multiple_choice(chosen: Chosen, margin: float) -> dict[str, Any]:
    """MC2 of localized and random heads and the KL it costs. Hyperparameters are chosen by MC2 on validation."""
    localized, random = chosen.records["claim", -1], chosen.random
    better = worse = None
    if localized is not None:  # a random set whose edits all diverged counts as better
        better = sum(record is None or _is_better(record, localized) for record in random)
        worse = sum(record is not None and _is_better(localized, record) for record in random)
    return {
        **_versus_random(_verdict(chosen), chosen.few(margin)),
        "localized_kl": None if localized is None else localized.drift["kl"],
        "over_unedited": _match(chosen, localized, chosen.at("base"), margin),
        "n_random_better_in_both": better,
        "n_random_worse_in_both": worse,
    }


def _is_better(one: TrialRecord, other: TrialRecord) -> bool:
    """Whether `one` has at least as high an MC2 at no more KL than `other`."""
    return one.metrics["test"]["mc2"] >= other.metrics["test"]["mc2"] and one.drift["kl"] <= other.drift["kl"]


def compare_leads(iti: Chosen, optimal: Chosen, margin: float) -> dict[str, Any]:
    """Difference in MC2 lead, ITI minus optimal edits; the lead is localized heads minus mean random set."""
    leads = []
    for chosen in (iti, optimal):
        random = [chosen.values(record)[0] for record in chosen.random if record is not None]
        if chosen.records.get(("claim", -1)) is None or not random:
            return {"difference": None, "interval_95": [None, None], "few": True}
        # (questions,): the lead at each question
        leads.append(chosen.at("claim")[0] - np.mean(random, axis=0))
    difference = float(np.mean(leads[0]) - np.mean(leads[1]))
    few = differ_too_little(leads[0], [leads[1]], margin)
    return {"difference": difference, "interval_95": paired_interval(leads[0], leads[1]), "few": few}


def _head_effects(audit: Tables, score: str) -> dict[tuple[int, ...], float]:
    """(layer, head) -> gain of its optimal edit over the unedited model; tau chosen on validation by the score."""
    chosen = Chosen(audit, "optimal", score)
    base = chosen.mean(audit.base.record)
    records = [record for record in chosen.records.values() if record is not None]
    return {_head(record.spec.location): chosen.mean(record) - base for record in records}


def measure_probe_effect(audit: Tables) -> dict[str, Any]:
    """Spearman correlation, over single heads, of probe accuracy and the optimal edit's gain in each metric."""
    accuracy, out = np.asarray(_probes(audit).val_accuracy), {}
    for score in (SCORE, "truth", "mc2"):
        effects = _head_effects(audit, score)
        x, y = [float(accuracy[at]) for at in effects], list(effects.values())
        rho, p = rank_correlation(x, y)
        names = [f"{layer}.{head}" for layer, head in effects]
        out[score] = {"n": len(x), "spearman": rho, "p": p, "heads": names, "val_accuracy": x, "effects": y}
    return out


def measure_landscape(audit: Tables) -> dict[str, Any]:
    """Gain of the optimal edit at every head, (layers, heads), and its correlation with probe accuracy."""
    accuracy = np.asarray(_probes(audit).val_accuracy)
    out: dict[str, Any] = {"tau": audit.config.methods["optimal"].strengths[0], "n": 0}
    for score in (SCORE, "truth", "mc2", "reward_accuracy"):
        effects = np.full(accuracy.shape, np.nan)
        for at, effect in _head_effects(audit, score).items():
            effects[at] = effect
        rho, p = rank_correlation(accuracy.ravel().tolist(), effects.ravel().tolist())
        out["n"] = int(np.isfinite(effects).sum())
        out[score] = {"spearman": rho, "p": p, "effects": effects.tolist()}
    return out


def _head(location: Location | None) -> tuple[int, ...]:
    """(layer, head) of a single-head location."""
    assert location is not None
    return tuple(map(int, location.units[0]))


def _probes(audit: Tables) -> ProbeFacts:
    """The probes' results; every audit of the study has a probed claim."""
    assert audit.probes is not None
    return audit.probes


def _facts(audit: Tables) -> dict[str, Any]:
    """Training settings of optimal edits in an audit."""
    return dict(audit.manifest.methods["optimal"].training or {})


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _nan_free(statistic: Callable[[NDArray[np.float64]], Any], values: NDArray[np.float64]) -> float:
    return float(statistic(values)) if np.isfinite(values).sum() > 1 else math.nan
