"""Every number of the study, as JSON-ready values: ``numbers.json``, from which figures, tables and page are drawn."""

from __future__ import annotations

from typing import Any

from locaudit.location import parse_location
from locaudit.records import Arm, Method
from locaudit.stats.words import MAX_MISSING
from locaudit.studies.paper.effects import (
    compare_leads,
    measure_gain,
    measure_landscape,
    measure_method,
    measure_multiple_choice,
    measure_probe_effect,
    measure_single,
    trial_scores,
)
from locaudit.studies.paper.study import SCORE, Study, data_release


def measure(study: Study) -> dict[str, Any]:
    """Setup, each method at sets of heads, single heads, multiple choice, gains, and the landscape if there is one."""
    sets, single = study.sets, study.audits["single"]
    localized: tuple[Method, Arm] = ("optimal", "claim")
    whole: tuple[Method, Arm] = ("optimal", "whole")

    def gain(first: tuple[Method, Arm], second: tuple[Method, Arm] | None) -> dict[str, Any]:
        return measure_gain(sets, first, second, study.config.margin)

    return {
        "setup": _setup(study),
        "training": _training(study),
        "base": trial_scores(sets.base),
        "iti": measure_method(study, "iti"),
        "optimal": measure_method(study, "optimal"),
        "gains": {
            "whole optimal over localized ITI": gain(whole, ("iti", "claim")),
            "localized optimal over localized ITI": gain(localized, ("iti", "claim")),
            "localized optimal over whole optimal": gain(localized, whole),
            "localized ITI over whole ITI": gain(("iti", "claim"), ("iti", "whole")),
            "localized ITI over unedited": gain(("iti", "claim"), None),
            "localized optimal over unedited": gain(localized, None),
            "whole optimal over unedited": gain(whole, None),
        },
        "single": measure_single(study),
        "multiple_choice": {
            **{method: measure_multiple_choice(sets, method, study.config.margin_mc) for method in ("iti", "optimal")},
            "lead_under_iti_minus_optimal": compare_leads(sets, study.config.margin_mc),
        },
        "probe_effect": measure_probe_effect(single),
        "landscape": measure_landscape(study),
        "run": _run(study),
    }


def _setup(study: Study) -> dict[str, Any]:
    sets, config = study.sets, study.config
    run, probes, data = sets.run, sets.probes, sets.run["data"]
    accuracy = probes["val_accuracy"]
    heads = parse_location(run["claim"]).units
    return {
        "model": run["model"],
        "n_layers": run["n_layers"],
        "n_heads": run["n_heads"],
        "head_dim": run["head_dim"],
        "n_heads_in_all": run["n_layers"] * run["n_heads"],
        "data": {
            "name": run["behaviour"],
            "release": data_release(**data),
            **data,
            "true_a_question": data["true"] / data["questions"],
            "false_a_question": data["false"] / data["questions"],
        },
        "n_questions": run["n_questions"],
        "judges": {aspect: judge["name"] for aspect, judge in sets.judges.items()},
        "score": SCORE,
        "margin": config.margin,
        "margin_mc": config.margin_mc,
        "max_missing": MAX_MISSING,
        "level": config.level,
        "seed": config.seed,
        "probes": {
            "context": probes["context"],
            "n_train": probes["n_train"],
            "n_val": probes["n_val"],
            "majority": probes["majority"],
            "best": max(map(max, accuracy)),
            "val_accuracy": accuracy,
        },
        "localized": [{"head": f"{layer}.{head}", "val_accuracy": accuracy[layer][head]} for layer, head in heads],
        "n_localized": len(heads),
    }


def _training(study: Study) -> dict[str, Any]:
    settings, single = study.config.optimal, study.audits["single"]
    facts = dict(study.sets.run["training"])
    rates = facts.pop("learning_rate")
    return {
        "objective": settings.objective,
        "reduction": settings.reduction,
        "reader": settings.reader,
        "taus": list(settings.strengths),
        "epochs": settings.epochs,
        "schedule": "cosine",
        **facts,
        "learning_rate": {
            "whole model": rates["whole"],
            "localized heads": rates["claim"],
            "single head": single.run["training"]["learning_rate"]["claim"],
        },
    }


def _run(study: Study) -> dict[str, Any]:
    """Machine, versions, time."""
    run = study.sets.run
    return {
        "n_trials": {part: len(audit.records) for part, audit in study.audits.items()},
        "seconds": {part: audit.seconds for part, audit in study.audits.items()},
        "device": run.get("device"),
        "dtype": run.get("dtype"),
        "threads": run.get("threads"),
        "versions": run.get("versions"),
        "fingerprint": run.get("fingerprint"),
    }
