"""Plan an audit: which trials it has, in which order they run, and which run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from locaudit.claims import find_kind
from locaudit.claims.kinds import Shape
from locaudit.config import AuditConfig
from locaudit.location import Location
from locaudit.methods import Method
from locaudit.records import DIRECTION_NULLS, DIRECTIONS, NO_METHOD, Arm, TrialSpec, content_hash
from locaudit.registry import METHODS

if TYPE_CHECKING:
    from locaudit.measure.tree import Forest  # it imports torch

Groups = list[list[TrialSpec]]
Banks = tuple[int, int]
"""(edits trained together, edits scored together)."""


def fit_context(
    fingerprint: str, training: Forest, n_true: Sequence[int], probing: Any, name: str, settings: Any, drift: str
) -> str:
    """Hash of everything that determines an edit besides its trial: model, training questions, settings.

    Training questions enter as token ids, each with the number `n_true` of its first answers that are true. `probing`
    are the settings that activations are read with. The method's grid and its bank size are left out, because an edit
    does not depend on them. Doses of KL depend on the documents that drift is measured on, whose hash is `drift`.
    """
    method: Method = METHODS[name]
    values = {key: x for key, x in asdict(settings).items() if key not in (*method.grids, "bank_size")}
    if values.get("learning_rate", 0) is None:  # earlier versions had one default for all numbers of pairs
        values["learning_rate"] = "by size and pairs"
    if values.get("positions") == "all":  # as before there was this setting
        del values["positions"]
    if (grid := method.grid_of(settings)) == "doses":
        values[grid] = drift
    trees = zip(training.trees, n_true, strict=True)
    texts = [training.prefix, [[tree.prompt, tree.branches, n, *tree.mark] for tree, n in trees]]
    return content_hash([fingerprint, texts, probing, values])


def null_of(config: AuditConfig, name: str) -> Literal["places", "directions"]:
    """What the controls of a method are: its `Method.null`, or places if these are random directions themselves."""
    return "places" if set(config.nulls) & set(DIRECTION_NULLS) else METHODS[name].null


def training_seed(config: AuditConfig) -> int:
    """The seed of training, which also draws the placebos."""
    return config.seed if config.training_seed is None else config.training_seed


def build_plan(
    config: AuditConfig,
    shape: Shape,
    claim: Location,
    controls: Mapping[str, Sequence[Location]],
    contexts: Mapping[str, str],
    banks: Banks,
    registration: str = "",
    placebos: Sequence[Mapping[str, str]] = (),
) -> Groups:
    """Groups of trials in the order they run: base, claim, whole model, rest, placebos, controls, rests of controls.

    Each group is scored as one bank; the controls in it are those of one null, as are the rests. `contexts` maps each
    method to its `fit_context`, and `NO_METHOD` to the context of the unedited model. `placebos` has the methods'
    contexts for each placebo. Groups depend only on the plan and not on what
    is done already, so a resumed run trains and scores the same banks. If controls may stop early, a group of them is
    only one training bank, so that the stopping rule is checked more often, and methods take turns: controls of a null
    stop for all methods at once.
    """
    seed = training_seed(config)

    def trial(arm: Arm, method: str, place: Location | None, strength: float | None, n: int = -1, draw=None, null=""):
        context = placebos[n][method] if arm == "placebo" else contexts[method]
        return TrialSpec(arm, method, place, strength, seed, context, n, draw, registration, null)

    def specs_of(part: str, name: str) -> list[TrialSpec]:
        """The trials of one method in one part of the plan: a null's name stands for the controls of that null."""
        method: Method = METHODS[name]
        grid, arms = method.strengths(config.methods[name]), _arms(config, method, shape, claim)
        if part == "arms":
            return [trial(arm, name, place, x) for arm, place in arms for x in grid]
        if part == "placebos":
            numbers = range(len(placebos) if method.has_placebo(config.methods[name]) else 0)
            return [trial("placebo", name, claim, x, n) for n in numbers for x in grid]
        if part == "rests":
            null = next(iter(controls), "")
            has_rest = null_of(config, name) != DIRECTIONS and any(arm == "rest" for arm, _ in arms)
            places = enumerate(controls.get(null, ())[: config.rest_controls] if has_rest else ())
            return [trial("rest", name, place.rest(), x, n, None, null) for n, place in places for x in grid]
        if null_of(config, name) == DIRECTIONS:
            draws = range(config.controls if part == DIRECTIONS else 0)
            return [trial("control", name, claim, x, n, n, part) for n in draws for x in grid]
        places = enumerate(controls.get(part, ()))
        return [trial("control", name, place, x, n, None, part) for n, place in places for x in grid]

    groups: Groups = [[trial("base", NO_METHOD, None, None)]]
    nulls = (*controls, DIRECTIONS)
    for part in ("arms", "placebos", *nulls, "rests"):
        may_end_early, found = config.stopping != "fixed" and part in nulls, []
        for name, settings in config.methods.items():
            specs, n_strengths = specs_of(part, name), len(METHODS[name].strengths(settings))
            size = _group_size(banks, METHODS[name].trained, n_strengths, may_end_early)
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
