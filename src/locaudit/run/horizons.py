"""Find the training length of methods with ``epochs: auto``, before the plan is run (`locaudit.methods.horizon`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from locaudit.config import AuditConfig
from locaudit.location import Location
from locaudit.methods import Job, Method
from locaudit.methods.horizon import Objectives, horizon, measure_objective
from locaudit.methods.settings import HORIZONS
from locaudit.records import Arm, TrialSpec, content_hash
from locaudit.registry import METHODS
from locaudit.run.prepare import Say, read_cached, write_cached
from locaudit.run.status import describe_seconds
from locaudit.run.worker import Shared, Worker
from locaudit.store.database import Store
from locaudit.store.manifest import Manifest
from locaudit.text import plural

Lengths = Mapping[str, Mapping[str, Objectives]]
"""Method with ``epochs: auto`` -> arm -> its objectives."""


def with_epochs(config: AuditConfig, lengths: Lengths) -> AuditConfig:
    """The settings with the training lengths that `lengths` settles filled in."""
    found = {name: max(horizon(x) or 0 for x in arms.values()) for name, arms in lengths.items()}
    methods = {
        name: replace(settings, epochs=found[name]) if name in found else settings
        for name, settings in config.methods.items()
    }
    return replace(config, methods=methods)


def known_lengths(manifest: Manifest | None) -> Lengths:
    """The `Lengths` that an earlier attempt has found."""
    found = {} if manifest is None else manifest.methods
    return {name: x for name, facts in found.items() if (x := (facts.training or {}).get("objectives"))}


def find_lengths(
    store: Store, shared: Shared, claim: Location, contexts: Mapping[str, str], say: Say
) -> dict[str, dict[str, list[float | None]]]:
    """The `Lengths` of all methods with ``epochs: auto``, kept in the run folder's cache.

    The edits are trained at the method's smallest strength: IPO's target margin 1 / (2 tau) is largest there, and takes
    longest to reach. `contexts` maps each method to its `locaudit.run.plan.fit_context`.
    """
    config, out = shared.config, {}
    for name, settings in config.methods.items():
        method: Method = METHODS[name]
        if getattr(settings, "epochs", None) != "auto":
            continue
        places: dict[Arm, Location] = {"claim": claim}
        if method.whole and config.whole_model:
            places["whole"] = Location.whole(claim.kind)
        strength = min(x for x in method.strengths(settings) if x is not None)
        file, key = f"epochs-{name}", content_hash([contexts[name], claim.to_json(), strength, config.seed])
        lengths = out[name] = (read_cached(store, file, key) or ({}, {}))[1]
        if left := _most_left(lengths, places):
            say(f"finding the training length of {name}: at most {plural(left, 'epoch')} of training")
        n_epochs, began = 0, time.monotonic()
        for arm, place in places.items():
            objectives, spec = lengths.setdefault(arm, []), TrialSpec(arm, name, place, strength, config.seed, "")
            while horizon(objectives) is None:
                epochs = HORIZONS[len(objectives)]
                objectives.append(_objective(shared, spec, replace(settings, epochs=epochs), say))
                write_cached(store, file, key, ({}, lengths))
                value = "diverged" if objectives[-1] is None else f"{objectives[-1]:.4g}"
                n_epochs, left = n_epochs + epochs, _most_left(lengths, places)
                pace = (time.monotonic() - began) / n_epochs
                more = f"; at most {plural(left, 'epoch')} more, about {describe_seconds(left * pace)}" if left else ""
                say(f"training length of {name}, {arm}: objective {value} after {plural(epochs, 'epoch')}{more}")
    return out


def _most_left(lengths: Mapping[str, Objectives], arms: Iterable[str]) -> int:
    """Epochs of training that the search takes at most from here on."""
    found = [lengths.get(arm, ()) for arm in arms]
    return sum(sum(HORIZONS[len(x) :]) for x in found if horizon(x) is None)


def _objective(shared: Shared, spec: TrialSpec, settings: Any, say: Say) -> float | None:
    """The objective after training one edit with these settings."""
    assert spec.location is not None and spec.hyperparameter is not None
    strength, fitter = spec.hyperparameter, METHODS[spec.method].fitter
    job = Job(spec.location, strength, spec.seed)

    def work(shared: Shared, _: Sequence[TrialSpec], on_step: Any) -> list[float | None]:
        (found,) = fitter(shared, [job], settings, on_step)
        data, residuals = shared.training, shared.residuals["train"]
        return [measure_objective(shared.model, data, found, strength, settings, residuals, shared.row_tokens)]

    found: list[Any] = list(Worker(shared, say, work).run([spec]))  # tries smaller batches if memory runs out
    return found[0][0]
