"""Plan an audit: which trials it has, in which order they run, and which run together."""

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
from locaudit.records import DIRECTIONS, NO_METHOD, Arm, TrialSpec, content_hash
from locaudit.registry import METHODS

Groups = list[list[TrialSpec]]
Banks = tuple[int, int]
"""(edits trained together, edits scored together)."""


def fit_context(fingerprint: str, training: Forest, probing: Any, name: str, settings: Any, drift: str) -> str:
    """Hash of everything that determines an edit besides its trial: model, training questions, settings.

    Training questions enter as token ids. `probing` are the settings that activations are read with. The method's grid
    and its bank size are left out, because an edit does not depend on them. Doses of KL depend on the documents that
    drift is measured on, whose hash is `drift`.
    """
    method: Method = METHODS[name]
    values = {key: x for key, x in asdict(settings).items() if key not in (*method.grids, "bank_size")}
    if (grid := method.grid_of(settings)) == "doses":
        values[grid] = drift
    texts = [training.prefix, [[tree.prompt, tree.branches] for tree in training.trees]]
    return content_hash([fingerprint, texts, probing, values])


def build_plan(
    config: AuditConfig,
    shape: Shape,
    claim: Location,
    controls: Mapping[str, Sequence[Location]],
    contexts: Mapping[str, str],
    banks: Banks,
    registration: str = "",
) -> Groups:
    """Groups of trials in the order they run: base, claim, whole model, rest, controls.

    Each group is scored as one bank; the controls in it are those of one null. `contexts` maps each method to its
    `fit_context`, and `NO_METHOD` to the context of the unedited model. Groups depend only on the plan and not on what
    is done already, so a resumed run trains and scores the same banks. If controls may stop early, a group of them is
    only one training bank, so that the stopping rule is checked more often, and methods take turns: controls of a null
    stop for all methods at once.
    """
    seed = config.seed if config.training_seed is None else config.training_seed

    def trial(arm: Arm, method: str, place: Location | None, strength: float | None, n: int = -1, draw=None, null=""):
        return TrialSpec(arm, method, place, strength, seed, contexts[method], n, draw, registration, null)

    groups: Groups = [[trial("base", NO_METHOD, None, None)]]
    for null in ("", *controls, DIRECTIONS):
        may_end_early = config.stopping != "fixed" and bool(null)
        found: Groups = []
        for name, settings in config.methods.items():
            method: Method = METHODS[name]
            grid = method.strengths(settings)
            if not null:
                specs = [trial(arm, name, place, x) for arm, place in _arms(config, method, shape, claim) for x in grid]
            elif method.null == DIRECTIONS:
                draws = range(config.controls if null == DIRECTIONS else 0)
                specs = [trial("control", name, claim, x, n, n, null) for n in draws for x in grid]
            else:
                places = enumerate(controls.get(null, ()))
                specs = [trial("control", name, place, x, n, None, null) for n, place in places for x in grid]
            size = _group_size(banks, method.trained, len(grid), may_end_early)
            found += [specs[i : i + size] for i in range(0, len(specs), size)]
        groups += sorted(found, key=lambda group: group[0].control) if may_end_early else found
    return groups


def _arms(config: AuditConfig, method: Method, shape: Shape, claim: Location) -> list[tuple[Arm, Location]]:
    """The arms of a method other than the controls, with their locations."""
    out: list[tuple[Arm, Location]] = [("claim", claim)]
    if method.whole and config.whole_model:
        out.append(("whole", Location.whole(claim.kind)))
        n_units = find_kind(claim).n_units(shape)
        # The rest is compared with the whole model, and must not be empty.
        if method.rest and config.rest and (n_units is None or len(claim) < n_units):
            out.append(("rest", claim.rest()))
    return out


def _group_size(banks: Banks, trained: bool, n_strengths: int, may_end_early: bool) -> int:
    training, scoring = banks
    if may_end_early:
        return training if trained else n_strengths
    return training * max(scoring // training, 1) if trained else scoring
