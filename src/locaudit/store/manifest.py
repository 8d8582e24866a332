"""What a run folder says about itself: model, data, claim, methods, judges, machine. Typed; no plug-in is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from locaudit.claims.kinds import Shape
from locaudit.config import Registration
from locaudit.location import Location, Unit
from locaudit.stats.growth import CONTROLS, Extension
from locaudit.stats.phrases import MethodFacts


@dataclass(frozen=True)
class JudgeFacts:
    """Who judges an aspect."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class ProbeFacts:
    """What the probes of every unit say."""

    kind: str
    val_accuracy: tuple[tuple[float, ...], ...]
    """[layer][unit]."""
    majority: float
    n_train: int
    n_val: int
    context: str
    units: tuple[Unit, ...]
    """The best, by falling accuracy."""


@dataclass(frozen=True)
class Manifest:
    """All that is known of a run besides its trials."""

    model: str
    fingerprint: str
    """Of weights, configuration and tokenizer."""
    shape: Shape
    n_units: int | None
    """Units of the claim's kind in the model; None for infinitely many."""
    kind_plural: str
    """What several of them are called."""
    behaviour: str
    aspects: tuple[str, ...]
    """What the behaviour asks of answers."""
    n_questions: Mapping[str, int]
    """Split -> questions."""
    data: Mapping[str, int]
    """Questions, true and false answers of the whole behaviour."""
    claim: Location
    claim_source: str
    methods: Mapping[str, MethodFacts]
    planned: int
    """Trials, when all controls run."""
    n_controls: int
    """Controls planned."""
    population: int | None
    """Places that controls were drawn from; None: too many to matter."""
    versions: Mapping[str, str]
    device: str
    dtype: str
    threads: int
    judges: Mapping[str, JudgeFacts] = field(default_factory=dict)
    """Aspect -> judge."""
    probes: ProbeFacts | None = None
    banks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Device -> (edits trained together, edits scored together), so that a resumed run ends with the same bytes."""
    registration: Registration | None = None
    plugins: tuple[str, ...] = ()
    primer: str | None = None
    """Text before each scored question; empty for none, None in a run of an earlier version."""
    extensions: tuple[Extension, ...] = ()
    """What was added after results existed, in order."""

    def __repr__(self) -> str:
        methods = ", ".join(self.methods)
        return f"Manifest({self.model} on {self.behaviour}: {self.claim!r} ({self.claim_source}), methods {methods})"


def extended(manifest: Manifest, before: Manifest, n_trials: int) -> Manifest:
    """The manifest of a run that goes on, with what it has more than `before`, when `n_trials` had results."""
    numbers: dict[str, tuple[int | str, int | str]] = {
        CONTROLS: (before.n_controls, manifest.n_controls),
        "test questions": (before.n_questions["test"], manifest.n_questions["test"]),
        "validation questions": (before.n_questions["val"], manifest.n_questions["val"]),
    }
    if manifest.judges.keys() - before.judges.keys():
        numbers["judges"] = (", ".join(before.judges) or "none", ", ".join(manifest.judges))
    added = [Extension(what, *pair, n_trials, before.planned) for what, pair in numbers.items() if pair[0] != pair[1]]
    return replace(manifest, extensions=(*before.extensions, *added) if n_trials else before.extensions)


_ADAPTER = TypeAdapter(Manifest)


def write_manifest(manifest: Manifest) -> str:
    """JSON text; `read_manifest` is the inverse."""
    return _ADAPTER.dump_json(manifest).decode()


def read_manifest(text: str) -> Manifest:
    """A manifest from `write_manifest`; pydantic's `ValidationError` for anything else."""
    return _ADAPTER.validate_json(text)
