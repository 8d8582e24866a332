"""Compute every number of the study as JSON-ready values: the content of ``numbers.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from locaudit.records import Place, TrialRecord, content_hash, json_text
from locaudit.report import Tables
from locaudit.stats import Design, decide, new_place_p, rank_correlation, t_test_p
from locaudit.stats.scores import MAX_MISSING
from locaudit.stats.selection import CLAIM, WHOLE
from locaudit.store.manifest import ProbeFacts
from locaudit.studies.paper.study import Chosen, Study

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
    """All numbers of a study but its claims, by section; a section whose part was not run is None."""
    sets = study.sets
    methods = {"iti": "iti", "optimal": "sets"}
    facts = ("device", "dtype", "threads", "versions", "fingerprint")
    return {
        "setup": _setup(study),
        "training": _training(study),
        "base": trial_scores(sets.base.record),
        **{name: measure_method(study, part) for name, part in methods.items()},
        "single": measure_single(study) if "single" in study.audits else None,
        "multiple_choice": {
            name: measure_multiple_choice(study.chosen(part, "mc2")) if part in study.audits else None
            for name, part in methods.items()
        },
        "probe_effect": measure_probe_effect(study, "single") if "single" in study.audits else None,
        "landscape": measure_landscape(study) if "landscape" in study.audits else None,
        "flags": {
            part: {flag.name: flag.text for flag in study.chosen(part, study.config.score).flags}
            for part in study.audits
        },
        "run": {
            "n_trials": {part: len(audit.rows) for part, audit in study.audits.items()},
            "seconds": {part: audit.seconds for part, audit in study.audits.items()},
            "not_run": study.lacking,
            "registration": {**vars(study.registration), "sentence": study.registration.sentence},
            "records": {part: _hashes(audit) for part, audit in study.audits.items()},
            "moved": {part: audit.manifest.moved for part, audit in study.audits.items() if audit.manifest.moved},
            **{name: getattr(sets.manifest, name) for name in facts},
        },
    }


def _hashes(audit: Tables) -> dict[str, str]:
    """Trial id -> hash of its scores, so that a number can be traced to a record."""
    records = [row.record for row in audit.rows]
    return {r.spec.trial_id: content_hash(json_text([r.status, r.questions, r.drift])) for r in records}


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
        "score": config.score,
        "training_seeds": config.training_seeds,
        "margin": study.rules["margin"],
        "level": study.rules["level"],
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
    rates = facts.pop("learning_rate")
    single = _facts(study.audits["single"])["learning_rate"]["claim"] if "single" in study.audits else None
    return {
        "objective": settings.objective,
        "taus": list(settings.strengths),
        "schedule": "cosine",
        **facts,
        "learning_rate": {"whole model": rates["whole"], "localized heads": rates["claim"], "single head": single},
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
    scores = [record.metrics["test"].get(chosen.score, math.nan) for record in finite]
    return {
        "location": str(trials[0].spec.location),
        "chosen": None if best is None else trial_scores(best),
        "score": chosen.mean(best),
        "best_on_test": max((x for x in scores if not math.isnan(x)), default=math.nan),
        "trials": [trial_scores(record) for record in finite],
    }


def measure_method(study: Study, part: str) -> dict[str, Any] | None:
    """One method at the first training seed: scores at the probed heads, random sets and whole model."""
    if part not in study.audits:
        return None
    chosen = study.chosen(part, study.config.score)
    localized, random = _place(chosen, CLAIM), [_place(chosen, place) for place in chosen.places()]
    return {
        "grid": sorted({x.spec.hyperparameter for x in chosen.trials[CLAIM] if x.spec.hyperparameter is not None}),
        "by_dose": part == "iti" and study.config.iti.doses is not None,
        "n_random": len(random),
        "n_random_diverged": chosen.random.count(None),
        **_versus_random(chosen),
        "localized": localized,
        "whole": _place(chosen, WHOLE),
        "random": random,
    }


def _versus_random(chosen: Chosen) -> dict[str, Any]:
    """The probed heads against the random places."""
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


def measure_single(study: Study) -> dict[str, Any]:
    """Random single heads and the best probed head, with the scores of the probed heads and the whole model."""
    chosen, sets = (study.chosen(part, study.config.score) for part in ("single", "sets"))
    rows = [_place(chosen, place) for place in (CLAIM, *chosen.places())]
    for row, (_, accuracy, rank) in zip(rows, study.heads("single"), strict=True):
        row |= {"head": row["location"], "val_accuracy": accuracy, "probe_rank": rank}
    localized, whole = (sets.mean(sets.at(arm)) for arm in ("claim", "whole"))
    best, *random = rows
    return {
        "n_random": len(random),
        "localized_score": localized,
        "whole_score": whole,
        "n_at_least_localized": sum(row["score"] >= localized - sets.tolerance for row in random),
        "n_at_least_whole": sum(row["score"] >= whole - sets.tolerance for row in random),
        "best_probed": best,
        "random": random,
    }


def measure_multiple_choice(chosen: Chosen) -> dict[str, Any]:
    """MC2 and KL of probed and random heads. Hyperparameters are chosen by MC2 on validation questions."""
    localized = chosen.records[CLAIM]
    strength, kl = (None, None) if localized is None else (localized.spec.hyperparameter, localized.drift["kl"])
    return {**_versus_random(chosen), "localized_hyperparameter": strength, "localized_kl": kl}


def measure_probe_effect(study: Study, part: str) -> dict[str, Any]:
    """Spearman correlation, over single heads, of probe accuracy and the optimal edit's gain in each metric."""
    out = {}
    for name, score in (("judged", study.config.score), ("mc2", "mc2")):
        chosen, heads = study.chosen(part, score), study.heads(part)
        gains = [chosen.mean(record) - chosen.mean(chosen.at("base")) for record in chosen.records.values()]
        found = [(at, x, gain) for (at, x, _), gain in zip(heads, gains, strict=True) if math.isfinite(gain)]
        names, x, y = [f"{layer}.{head}" for (layer, head), _, _ in found], [f[1] for f in found], [f[2] for f in found]
        rho, p = rank_correlation(x, y)
        out[name] = {"n": len(x), "spearman": rho, "p": p, "heads": names, "val_accuracy": x, "effects": y}
    return out


def measure_landscape(study: Study) -> dict[str, Any]:
    """Gain of the optimal edit at every head, (layers, heads), and its correlation with probe accuracy."""
    found, shape = measure_probe_effect(study, "landscape"), study.sets.manifest.shape
    for one in found.values():
        effects = np.full((shape.n_layers, shape.n_heads), np.nan)
        for name, effect in zip(one["heads"], one["effects"], strict=True):
            effects[tuple(map(int, name.split(".")))] = effect
        one["effects"] = effects.tolist()
    return {"tau": study.config.landscape_strength, "n": found["judged"]["n"], **found}


def _probes(audit: Tables) -> ProbeFacts:
    """The probes' results; every audit of the study has a probed claim."""
    assert audit.manifest.probes is not None
    return audit.manifest.probes


def _facts(audit: Tables) -> dict[str, Any]:
    """Training settings of optimal edits in an audit."""
    return dict(audit.manifest.methods["optimal"].training or {})
