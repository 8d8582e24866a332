"""The plan of an audit: which trials there are, in which order, and which run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from locaudit.claims import find_kind
from locaudit.claims.kinds import Shape
from locaudit.config import AuditConfig
from locaudit.location import Location
from locaudit.measure.tree import Forest
from locaudit.methods import Method
from locaudit.records import NO_METHOD, Arm, TrialSpec, content_hash
from locaudit.registry import METHODS

Groups = list[list[TrialSpec]]
Banks = tuple[int, int]
"""Edits trained together, and scored together."""


def fit_context(fingerprint: str, training: Forest, probing: Any, name: str, settings: Any) -> str:
    """Hash of all that an edit depends on besides its trial: model, training questions as token ids, settings.

    The method's grid and how many edits are trained together stay out. `probing` is what activations were read with.
    """
    method: Method = METHODS[name]
    values = {key: x for key, x in asdict(settings).items() if key not in (method.grid, "bank_size")}
    texts = [training.prefix, [[tree.prompt, tree.branches] for tree in training.trees]]
    return content_hash([fingerprint, texts, probing, values])


def build_plan(
    config: AuditConfig,
    shape: Shape,
    claim: Location,
    controls: Sequence[Location],
    contexts: Mapping[str, str],
    banks: Banks,
    registration: str = "",
) -> Groups:
    """Groups of trials in the order they run: base, claim, whole model, rest, controls; a group is scored as one bank.

    `contexts`: method -> `fit_context`; `NO_METHOD` -> that of the unedited model. Groups are fixed by the plan alone,
    so that a resumed run trains and scores the same banks. Where controls may end early, a group of them is one
    training bank.
    """
    seed = config.seed if config.training_seed is None else config.training_seed

    def trial(arm: Arm, method: str, place: Location | None, strength: float | None, n: int = -1, draw=None):
        return TrialSpec(arm, method, place, strength, seed, contexts[method], n, draw, registration)

    groups: Groups = [[trial("base", NO_METHOD, None, None)]]
    for of_controls in (False, True):
        for name, settings in config.methods.items():
            method: Method = METHODS[name]
            grid = method.strengths(settings)
            if of_controls and method.null == "directions":
                specs = [trial("control", name, claim, x, n, n) for n in range(config.controls) for x in grid]
            elif of_controls:
                specs = [trial("control", name, place, x, n) for n, place in enumerate(controls) for x in grid]
            else:
                specs = [trial(arm, name, place, x) for arm, place in _arms(config, method, shape, claim) for x in grid]
            size = _group_size(banks, method.trained, len(grid), config.stopping != "fixed" and of_controls)
            groups += [specs[i : i + size] for i in range(0, len(specs), size)]
    return groups


def _arms(config: AuditConfig, method: Method, shape: Shape, claim: Location) -> list[tuple[Arm, Location]]:
    """The places of a method besides the controls."""
    out: list[tuple[Arm, Location]] = [("claim", claim)]
    if method.whole and config.whole_model:
        out.append(("whole", Location.whole(claim.kind)))
        n_units = find_kind(claim).n_units(shape)
        # There must be a rest, and the whole to compare it with.
        if method.rest and config.rest and (n_units is None or len(claim) < n_units):
            out.append(("rest", claim.rest()))
    return out


def _group_size(banks: Banks, trained: bool, n_strengths: int, may_end_early: bool) -> int:
    training, scoring = banks
    if may_end_early:
        return training if trained else n_strengths
    return training * max(scoring // training, 1) if trained else scoring
