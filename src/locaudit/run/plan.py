"""The plan of an audit: which trials there are, in which order, and what each costs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from locaudit.behaviours import Split
from locaudit.config import AuditConfig, to_dict
from locaudit.location import Location, count_controls, sample_controls, unit_strata
from locaudit.models import Model
from locaudit.records import Arm, TrialSpec, content_hash
from locaudit.run.prepare import Prepared
from locaudit.run.worker import Shared, scored_splits

BACKWARD = 1.3
"""Cost of a backward pass through edited layers in units of a forward pass of the same tokens (weights are frozen)."""

DECODING = 1.5
"""Cost of a token that may be decoded in units of a token run forward: few rows at a time, but answers end early."""


def context_hash(config: AuditConfig, model: Model, split: Split, primer: str, drift_text: bytes = b"") -> str:
    """Hash of all that a trial's record depends on besides its own identity.

    What only adds trials or reads records (controls, claim, grids, level, score) stays out, so that the same trial has
    the same id in a larger audit.
    """
    values = to_dict(config)
    for key in (
        "model",
        "behaviour",
        "claim",
        "controls",
        "match",
        "disjoint",
        "stopping",
        "training_seed",
        "whole_model",
        "rest",
        "methods",
        "score",
        "level",
        "margin",
        "judges",
        "registered",
    ):
        del values[key]
    for group, keys in {
        "loading": ("device", "device_map", "revision", "trust_remote_code", "allow_pickle"),
        "probe": ("top_k",),
        "prompt": ("primer",),
        "split": tuple(values["split"]),
        "evaluation": ("drift_text",),
    }.items():
        for key in keys:
            del values[group][key]
    # One value in a grid means no validation scores; which values it holds does not matter to any other trial.
    values["iti"]["alphas"] = len(config.iti.alphas) > 1
    values["optimal"]["strengths"] = len(config.optimal.strengths) > 1
    text = hashlib.sha256(drift_text).hexdigest()
    return content_hash([values, model.fingerprint, split.fingerprint, primer, text])


def draw_controls(
    config: AuditConfig, model: Model, claim: Location, found: Prepared | None = None
) -> tuple[list[Location], int]:
    """The claim's controls, matched as the settings say, and of how many they are drawn.

    `found` holds the values that matching by a value needs; without it such controls are drawn as by ``none``.
    """
    claim.check(model.n_layers, model.n_units(claim.kind))
    match, values = config.match, None
    if match in ("probe-accuracy", "norm"):
        if found is None:
            match = "none"
        else:
            values = (found.probes.val_accuracy if match == "probe-accuracy" else found.norm).tolist()
    strata = unit_strata(
        match, model.n_layers, model.n_units(claim.kind), n_groups=model.n_groups(claim.kind), values=values
    )
    controls = sample_controls(claim, strata, config.controls, seed=config.seed, disjoint=config.disjoint)
    return controls, count_controls(claim, strata, disjoint=config.disjoint)


def build_plan(
    config: AuditConfig,
    model: Model,
    claim: Location,
    context: str,
    controls: Sequence[Location],
    registration: str = "",
) -> list[list[TrialSpec]]:
    """Groups of trials in the order they run: base, claim, whole model, rest, controls; a group is scored as one bank.

    Groups are fixed by the plan alone, so that a resumed run trains and scores the same banks. Where controls may end
    early, a group of them is one training bank.
    """
    places: list[tuple[Arm, int, Location]] = [("claim", -1, claim)]
    if config.whole_model:
        places.append(("whole", -1, model.whole(claim.kind)))
    if has_rest(config, model, claim):
        places.append(("rest", -1, claim.complement(model.n_layers, model.n_units(claim.kind))))
    places.extend(("control", n, location) for n, location in enumerate(controls))
    seed = config.seed if config.training_seed is None else config.training_seed
    groups = [[TrialSpec("base", "none", "", None, seed, context, registration=registration)]]
    for arms in (("claim", "whole", "rest"), ("control",)):
        for method in config.methods:
            size, training = config.evaluation.bank_size or 1, config.optimal.bank_size or 1
            grid = config.iti.alphas if method == "iti" else config.optimal.strengths
            if method == "optimal":  # whole training banks
                size = training * max(size // training, 1)
            if config.stopping != "fixed" and arms == ("control",):
                size = training if method == "optimal" else len(grid)
            specs = [
                TrialSpec(arm, method, str(location), value, seed, context, number, registration)
                for arm, number, location in places
                if arm in arms and (arm != "rest" or method == "optimal")
                for value in grid
            ]
            groups += [specs[i : i + size] for i in range(0, len(specs), size)]
    return groups


def has_rest(config: AuditConfig, model: Model, claim: Location) -> bool:
    """Whether the best edit of everything but the claim is sought: there must be a rest, and the whole to compare."""
    return config.rest and config.whole_model and len(claim) < len(model.whole(claim.kind))


def cost(shared: Shared, specs: Sequence[TrialSpec]) -> float:
    """Rough cost of a group, in tokens run forward through the whole model."""
    config, first = shared.config, specs[0]
    tokens = float(shared.drift.documents.numel())
    if first.method != "none":
        for name in scored_splits(config, first):
            held = shared.splits[name]
            tokens += held.forest.n_tokens + 2 * len(held.forest.prefix)
            tokens += DECODING * config.evaluation.max_new_tokens * len(held.questions)
    if first.method == "optimal":
        forest = shared.training.forest
        n_training = forest.n_tokens
        if config.optimal.batching == "pair":
            n_training = sum(
                len(tree.branches[t]) + len(tree.branches[f]) + len(tree.prompt)
                for tree, n_true in zip(forest.trees, shared.training.n_true, strict=True)
                for t in range(n_true)
                for f in range(n_true, len(tree.branches))
            )
        tokens += config.optimal.epochs * n_training * (1 + BACKWARD)
    return tokens * len(specs)
