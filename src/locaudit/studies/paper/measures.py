"""Compute every number of the study as JSON-ready values: the content of ``numbers.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from locaudit.records import TrialRecord
from locaudit.report import Tables
from locaudit.stats import (
    Design,
    Match,
    compare_edits,
    decide,
    holm,
    mean_score,
    monte_carlo_p,
    new_place_p,
    rank_correlation,
    reaches,
    t_test_p,
)
from locaudit.stats.scores import MAX_MISSING
from locaudit.stats.selection import CLAIM, WHOLE, Place
from locaudit.store.manifest import ProbeFacts
from locaudit.studies.paper.study import SCORE, Chosen, Study

METRICS = ("truth", "info", "info_truth", "info_truth_probability", "info_truth_both", "mc1", "mc2", "mc3")
"""Test scores that every trial of the study has."""
RELEASES: Mapping[tuple[int, int, int], str] = {
    (817, 2585, 3295): "TruthfulQA, first release (the hub's, and the one that fits the paper's number of pairs)",
    (817, 2835, 3367): "TruthfulQA, revision of October 2021 (the paper's number of pairs does not fit it)",
}
"""(number of questions, true answers, false answers) after loading -> release of TruthfulQA."""


def data_release(questions: int, true: int, false: int) -> str:
    """The release of TruthfulQA that has these numbers of questions, true answers and false answers."""
    return RELEASES.get((questions, true, false), "not TruthfulQA as released, the paper's data")


def measure(study: Study) -> dict[str, Any]:
    """All numbers of a study, by section: setup, training, methods, gains, single heads, multiple choice and more."""
    config, sets = study.config, study.sets
    iti, optimal = (Chosen(sets, method, config.margin) for method in ("iti", "optimal"))
    iti_mc, optimal_mc = (Chosen(sets, method, config.margin_mc, "mc2") for method in ("iti", "optimal"))
    facts = ("device", "dtype", "threads", "versions", "fingerprint")
    return {
        "setup": _setup(study),
        "training": _training(study),
        "base": trial_scores(sets.base.record),
        "iti": measure_method(iti, config.iti.alphas, config.level),
        "optimal": measure_method(optimal, config.optimal.strengths, config.level),
        "gains": measure_gains(iti, optimal),
        "single": measure_single(study, optimal),
        "multiple_choice": {
            "iti": measure_multiple_choice(iti_mc),
            "optimal": measure_multiple_choice(optimal_mc),
            "lead_under_iti_minus_optimal": _difference(
                compare_edits(_lead(iti_mc), _lead(optimal_mc), margin=config.margin_mc, tolerance=iti_mc.tolerance)
            ),
        },
        "probe_effect": measure_probe_effect(study.audits["single"]),
        "landscape": measure_landscape(study.audits["landscape"]) if "landscape" in study.audits else None,
        "run": {
            "n_trials": {part: len(audit.rows) for part, audit in study.audits.items()},
            "seconds": {part: audit.seconds for part, audit in study.audits.items()},
            **{name: getattr(sets.manifest, name) for name in facts},
        },
    }


def _setup(study: Study) -> dict[str, Any]:
    config, run = study.config, study.sets.manifest
    probes, data, heads = _probes(study.sets), run.data, study.sets.claimed_heads
    return {
        "model": run.model,
        **{name: getattr(run.shape, name) for name in ("n_layers", "n_heads", "head_dim")},
        "n_heads_in_all": run.shape.n_layers * run.shape.n_heads,
        "data": {
            "name": run.behaviour,
            "release": data_release(**data),
            **data,
            "true_a_question": data["true"] / data["questions"],
            "false_a_question": data["false"] / data["questions"],
        },
        "n_questions": run.n_questions,
        "judges": {aspect: judge.name for aspect, judge in run.judges.items()},
        **{name: getattr(config, name) for name in ("margin", "margin_mc", "level")},
        "max_missing": MAX_MISSING,
        "probes": {
            **{name: getattr(probes, name) for name in ("context", "n_train", "n_val", "majority", "val_accuracy")},
            "best": max(map(max, probes.val_accuracy)),
        },
        "localized": [
            {"head": f"{layer}.{head}", "val_accuracy": probes.val_accuracy[layer][head]} for layer, head in heads
        ],
        "n_localized": len(heads),
    }


def _training(study: Study) -> dict[str, Any]:
    settings, facts = study.config.optimal, _facts(study.sets)
    rates, single = facts.pop("learning_rate"), _facts(study.audits["single"])["learning_rate"]
    return {
        "objective": settings.objective,
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


def _place(chosen: Chosen, place: Place) -> dict[str, Any]:
    """One place: its trials, the trial chosen on validation, and the best score on test.

    The paper does not say on which questions it selects its best scores. In case it means test questions, the best
    score on these is given too.
    """
    trials, best = chosen.trials[place], chosen.records[place]
    finite = [record for record in trials if record.status == "ok"]
    scores = [record.metrics["test"].get(SCORE, math.nan) for record in finite]
    return {
        "location": str(trials[0].spec.location),
        "chosen": None if best is None else trial_scores(best),
        "best_on_test": max((x for x in scores if not math.isnan(x)), default=math.nan),
        "trials": [trial_scores(record) for record in finite],
    }


def _random_places(chosen: Chosen, sets: Chosen) -> list[dict[str, Any]]:
    """The random places of `chosen`, each compared with the probed heads and the whole model (both from `sets`)."""
    places = [place for place in chosen.records if place.arm == "control"]
    localized, whole = (_matches(chosen, sets.values(sets.records[place])) for place in (CLAIM, WHOLE))
    return [
        {**_place(chosen, place), "against_localized": one, "against_whole": other}
        for place, one, other in zip(places, localized, whole, strict=True)
    ]


def measure_method(chosen: Chosen, grid: Sequence[float], level: float) -> dict[str, Any]:
    """One method: scores at the probed heads, random sets and whole model, and their comparisons.

    `grid` has the hyperparameters that were tried.
    """
    localized, random = _place(chosen, CLAIM), _random_places(chosen, chosen)
    best_on_test = localized["best_on_test"], [place["best_on_test"] for place in random], chosen.tolerance
    return {
        "grid": list(grid),
        "n_random": len(random),
        "n_random_diverged": chosen.random.count(None),
        **_versus_random(chosen),
        "random_matching": _count(random, "against_localized", level),
        "random_matching_whole": _count(random, "against_whole", level),
        "best_on_test": {"p_monte_carlo": monte_carlo_p(*best_on_test), "p_t_test": t_test_p(*best_on_test)},
        "truth_gains": _truth_gains(chosen),
        "localized": localized,
        "whole": _place(chosen, WHOLE),
        "random": random,
    }


def _versus_random(chosen: Chosen) -> dict[str, Any]:
    """The test of the probed heads against the random places."""
    records = [row.record for row in chosen.audit.rows]
    design = Design(dtype=chosen.audit.manifest.dtype)
    verdict = decide(records, score=chosen.score, design=design).methods[chosen.method]
    null = verdict.first
    return {
        "localized_score": verdict.claim,
        "random_scores": list(null.controls),
        "n_at_least": null.n_at_least,
        "worst_missing": verdict.worst_missing,
        "p_monte_carlo": null.p_value,
        "p_smallest": 1 / (1 + len(null.controls)),
        "p_t_test": t_test_p(verdict.claim, null.controls, chosen.tolerance),
        "p_new_place": new_place_p(verdict.claim, null.controls, chosen.tolerance),
        "gap": {"difference": null.lead, "interval_95": null.lead_interval},
    }


def _difference(match: Match) -> dict[str, Any]:
    return {"difference": match.difference, "interval_95": match.interval_95}


def _truth_gains(chosen: Chosen) -> dict[str, Any]:
    """Gains of the chosen edits in Truth over the unedited model. In the paper, ITI at random sets has hardly any."""
    # only to read values: the edits are chosen by the main score
    truth, margin = Chosen(chosen.audit, chosen.method, chosen.margin, "truth"), chosen.margin
    localized, *random = (
        compare_edits(truth.values(record), truth.at("base"), margin=margin, tolerance=truth.tolerance)
        for record in (chosen.records[CLAIM], *chosen.random)
    )
    gains = [gain.difference for gain in random]
    known = [gain.interval_95 for gain in random]
    return {
        "localized": _difference(localized),
        "random_median": float(np.nanmedian(gains)) if np.isfinite(gains).sum() > 1 else math.nan,
        "n_noticeable": sum(low > 0 or high < 0 for low, high in known),
        "n_within_margin": sum(-margin < low and high < margin for low, high in known),
    }


def _match(chosen: Chosen, record: TrialRecord | None, reference: NDArray[np.float64]) -> dict[str, Any]:
    """Compare an edit with reference values. A diverged edit is worse than any reference that has a score."""
    match = compare_edits(chosen.values(record), reference, margin=chosen.margin, tolerance=chosen.tolerance)
    has_reference = not np.isnan(mean_score(reference))
    return {
        "difference": match.difference,
        "interval_90": match.interval,
        "p_worse_by_margin": match.p,
        "outcome": "worse" if record is None and has_reference else match.outcome,
    }


def _matches(chosen: Chosen, reference: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Compare the edit at each random place with the reference, with a Holm-adjusted p over places."""
    found = [_match(chosen, record, reference) for record in chosen.random]
    adjusted = holm([match["p_worse_by_margin"] for match in found])
    return [{**match, "p_holm": p} for match, p in zip(found, adjusted, strict=True)]


def _count(rows: Sequence[dict[str, Any]], name: str, level: float) -> dict[str, int]:
    """Number of places that match (not worse by more than the margin), are worse, or are undecided."""
    outcomes = [row[name]["outcome"] for row in rows]
    return {
        "match": outcomes.count("not worse"),
        "match_holm": sum(row[name]["p_holm"] <= level for row in rows),
        "worse": outcomes.count("worse"),
        "undecided": outcomes.count("undecided"),
    }


def measure_gains(iti: Chosen, optimal: Chosen) -> dict[str, Any]:
    """Differences between the edits at the probed heads, those of the whole model, and the unedited model."""
    arms = {
        "localized ITI": iti.records[CLAIM],
        "whole ITI": iti.records[WHOLE],
        "localized optimal": optimal.records[CLAIM],
        "whole optimal": optimal.records[WHOLE],
        "unedited": iti.audit.base.record,
    }
    return {
        f"{one} over {other}": _match(iti, arms[one], iti.values(arms[other]))
        for one, other in (
            ("whole optimal", "localized ITI"),
            ("localized optimal", "localized ITI"),
            ("localized optimal", "whole optimal"),
            ("localized ITI", "whole ITI"),
            ("localized optimal", "unedited"),
            ("whole optimal", "unedited"),
        )
    }


def measure_single(study: Study, sets: Chosen) -> dict[str, Any]:
    """Compare random single heads and the best probed head with the probed heads and the whole model."""
    margin, level = study.config.margin, study.config.level
    chosen = Chosen(study.audits["single"], sets.method, margin)
    accuracy = np.asarray(_probes(chosen.audit).val_accuracy)
    ranks = rankdata(-accuracy, method="ordinal").reshape(accuracy.shape)  # equal ones by layer, then by head
    localized, whole = sets.at("claim"), sets.at("whole")
    best = {**_place(chosen, CLAIM), "against_localized": _match(chosen, chosen.records[CLAIM], localized)}
    random = _random_places(chosen, sets)
    for place, row in zip(chosen.records, (best, *random), strict=True):  # the claim first, then controls by number
        at = _head(chosen.trials[place][0])
        row["head"], row["score"] = row["location"], chosen.mean(chosen.records[place])
        row["val_accuracy"], row["probe_rank"] = float(accuracy[at]), int(ranks[at])
    localized_score = float(mean_score(localized))
    return {
        "rule": (
            f"a head matches if the 90 % interval of its score minus the other's, over the same test "
            f"questions, lies above -{margin:g}; it is worse if the interval lies below -{margin:g}; otherwise it "
            "is undecided. If a claim says that one or several of many heads match, their "
            "tests are corrected by Holm's method"
        ),
        "n_random": len(random),
        "localized_score": localized_score,
        "whole_score": float(mean_score(whole)),
        "matching": _count(random, "against_localized", level),
        "matching_whole": _count(random, "against_whole", level),
        "n_at_least_localized": int(np.sum(reaches([row["score"] for row in random], localized_score, sets.tolerance))),
        "matching_probe_rank": [row["probe_rank"] for row in random if row["against_localized"]["p_holm"] <= level],
        "n_random_among_probed": sum(row["probe_rank"] <= study.config.probe.top_k for row in random),
        "best_probed": best,
        "random": random,
    }


def measure_multiple_choice(chosen: Chosen) -> dict[str, Any]:
    """MC2 and KL of probed and random heads. Hyperparameters are chosen by MC2 on validation questions."""
    localized, random = chosen.records[CLAIM], chosen.random
    better = worse = None
    if localized is not None:  # a random set whose edits all diverged counts as better
        better = sum(record is None or _is_better(record, localized) for record in random)
        worse = sum(record is not None and _is_better(localized, record) for record in random)
    return {
        **_versus_random(chosen),
        "localized_kl": None if localized is None else localized.drift["kl"],
        "over_unedited": _match(chosen, localized, chosen.at("base")),
        "n_random_better_in_both": better,
        "n_random_worse_in_both": worse,
    }


def _is_better(one: TrialRecord, other: TrialRecord) -> bool:
    """Whether the MC2 of `one` is at least as high as that of `other`, and its KL not higher."""
    return one.metrics["test"]["mc2"] >= other.metrics["test"]["mc2"] and one.drift["kl"] <= other.drift["kl"]


def _lead(chosen: Chosen) -> NDArray[np.float64]:
    """MC2 at the probed heads minus its mean over the random sets, (questions,); NaN if either has no score."""
    claim = chosen.at("claim")[0]
    random = [chosen.values(record)[0] for record in chosen.random if record is not None]
    return claim - np.mean(random or [np.full_like(claim, np.nan)], axis=0)


def _head_effects(audit: Tables, score: str) -> dict[tuple[int, ...], float]:
    """(layer, head) -> gain of its optimal edit over the unedited model, with the tau that is best on validation."""
    chosen = Chosen(audit, "optimal", score=score)
    base = chosen.mean(audit.base.record)
    return {_head(record): chosen.mean(record) - base for record in chosen.records.values() if record is not None}


def measure_probe_effect(audit: Tables) -> dict[str, Any]:
    """Spearman correlation, over single heads, of probe accuracy and the optimal edit's gain in each metric."""
    accuracy, out = np.asarray(_probes(audit).val_accuracy), {}
    for score in (SCORE, "mc2"):
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
    for score in (SCORE, "mc2"):
        effects = np.full(accuracy.shape, np.nan)
        for at, effect in _head_effects(audit, score).items():
            effects[at] = effect
        rho, p = rank_correlation(accuracy.ravel().tolist(), effects.ravel().tolist())
        out["n"] = int(np.isfinite(effects).sum())
        out[score] = {"spearman": rho, "p": p, "effects": effects.tolist()}
    return out


def _head(record: TrialRecord) -> tuple[int, ...]:
    """(layer, head) of an edit of a single head."""
    assert record.spec.location is not None
    return tuple(map(int, record.spec.location.units[0]))


def _probes(audit: Tables) -> ProbeFacts:
    """The probes' results; every audit of the study has a probed claim."""
    assert audit.probes is not None
    return audit.probes


def _facts(audit: Tables) -> dict[str, Any]:
    """Training settings of optimal edits in an audit."""
    return dict(audit.manifest.methods["optimal"].training or {})
