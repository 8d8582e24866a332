"""The manifest of a run: facts about model, data, claim, methods, judges and machine. Read without plug-ins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pydantic import TypeAdapter

from locaudit.claims.kinds import Shape
from locaudit.config import Registration
from locaudit.location import Location, Unit
from locaudit.stats.growth import CONTROLS, NULLS, PLACEBOS, RESTS, Extension
from locaudit.stats.phrases import MethodFacts
from locaudit.stats.sequential import Null, Rule
from locaudit.text import plural


@dataclass(frozen=True)
class JudgeFacts:
    """The judge of an aspect."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class ProbeFacts:
    """Results of the probes of all units."""

    kind: str
    val_accuracy: tuple[tuple[float, ...], ...]
    """Validation accuracy, as [layer][unit]."""
    majority: float
    n_train: int
    n_val: int
    context: str
    units: tuple[Unit, ...]
    """The best units, by falling accuracy."""


@dataclass(frozen=True)
class Manifest:
    """Everything known about a run besides its trials."""

    model: str
    fingerprint: str
    """Hash of weights, configuration and tokenizer."""
    shape: Shape
    n_units: int | None
    """Number of units of the claim's kind in the model; None for infinitely many."""
    kind_plural: str
    """Plural name of the claim's kind, such as ``heads``."""
    behaviour: str
    aspects: tuple[str, ...]
    """Aspects in which the behaviour's answers can be judged, such as ``truth``."""
    n_questions: Mapping[str, int]
    """Split -> number of questions."""
    data: Mapping[str, int]
    """Numbers of questions, true answers and false answers of the whole behaviour."""
    claim: Location
    claim_source: str
    methods: Mapping[str, MethodFacts]
    planned: int
    """Number of trials planned; lower if controls stopped early."""
    nulls: Mapping[str, Null]
    """Name -> controls planned for each null, of those that have any, in the order of the settings."""
    versions: Mapping[str, str]
    device: str
    dtype: str
    threads: int
    rest_controls: int = 0
    """Rests of controls planned for each method that edits the rest (`Method.rest`)."""
    placebos: int = 0
    """Placebos planned for each method that has any (`Method.placebo`)."""
    widen: int = 0
    """How many strengths are added at most to a grid whose best strength is at an edge."""
    samples: int = 0
    """Sampled answers to each test question."""
    stopping: Rule = "fixed"
    """The stopping rule when the first results were stored. Another one may be set later."""
    judges: Mapping[str, JudgeFacts] = field(default_factory=dict)
    """Aspect -> judge."""
    probes: ProbeFacts | None = None
    banks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Device -> (edits trained together, edits scored together); a resumed run uses the same."""
    registration: Registration | None = None
    plugins: tuple[str, ...] = ()
    primer: str | None = None
    """Text before each scored question; empty if there is none, None in a run of an earlier version."""
    prompt: str | None = None
    """The prompt of the first test question as the model got it; None in a run of an earlier version."""
    prompt_end: str | None = None
    """The last 40 characters that the chat template writes before an answer; None in style ``qa``."""
    prompt_date: str | None = None
    """The day on which the chat template's clock stood; None if the template does not print it."""
    drift_on: str = ""
    """What KL and cross-entropy are measured on, as words after "KL from the unedited model"; empty: running text."""
    extensions: tuple[Extension, ...] = ()
    """What was added to the run after it had results, in order."""
    machines: tuple[tuple[int, str], ...] = ()
    """If trials ran on several machines, or with several numbers of threads or versions: how many trials were stored
    before the first on each, and the machine in words. Empty if there was one."""
    notes: tuple[str, ...] = ()
    """What a reader should know about the inputs before believing the scores, one sentence or two each."""

    @property
    def n_controls(self) -> int:
        """Number of controls planned for the null that has most."""
        return max(null.n_planned for null in self.nulls.values())

    @property
    def machine(self) -> str:
        """What the last digits of sums depend on, as text."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        return f"{self.device} with {plural(self.threads, 'thread')} ({versions})"

    @property
    def moved(self) -> str:
        """Which trials ran on which machine, in a sentence; empty if all ran on one."""
        if not self.machines:
            return ""
        parts = [f"trials {start + 1} to {end} on {machine}" for (start, machine), (end, _) in pairwise(self.machines)]
        return f"Not all trials ran alike: {', '.join(parts)}, later ones on {self.machines[-1][1]}."

    def __repr__(self) -> str:
        methods = ", ".join(self.methods)
        return f"Manifest({self.model} on {self.behaviour}: {self.claim!r} ({self.claim_source}), methods {methods})"


def extended(manifest: Manifest, before: Manifest, n_trials: int) -> Manifest:
    """The manifest of a run that is continued, noting what it has more than `before`, and what machine `before` had.

    `n_trials` is how many trials had results by then. Without any, nothing is noted.
    """
    n_trials = min(n_trials, before.planned)  # without those by which grids widened
    numbers: dict[str, tuple[int | str, int | str]] = {
        CONTROLS: (before.n_controls, manifest.n_controls),
        NULLS: (", ".join(before.nulls), ", ".join(manifest.nulls)),
        RESTS: (before.rest_controls, manifest.rest_controls),
        PLACEBOS: (before.placebos, manifest.placebos),
        "test questions": (before.n_questions["test"], manifest.n_questions["test"]),
        "validation questions": (before.n_questions["val"], manifest.n_questions["val"]),
        "sampled answers to each question": (before.samples, manifest.samples),
    }
    if manifest.judges.keys() - before.judges.keys():
        numbers["judges"] = (", ".join(before.judges) or "none", ", ".join(manifest.judges))
    added = [Extension(what, *pair, n_trials, before.planned) for what, pair in numbers.items() if pair[0] != pair[1]]
    if not n_trials:
        return replace(manifest, extensions=before.extensions)
    kept = tuple(x for x in before.machines or ((0, before.machine),) if x[0] < n_trials)
    if n_trials >= manifest.planned:  # nothing is left to run here
        manifest = replace(manifest, device=before.device, threads=before.threads, versions=before.versions)
    elif kept[-1][1] != manifest.machine:
        kept += ((n_trials, manifest.machine),)
    machines = kept if len(kept) > 1 else ()
    return replace(manifest, extensions=(*before.extensions, *added), stopping=before.stopping, machines=machines)


_ADAPTER = TypeAdapter(Manifest)


def write_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text; `read_manifest` is the inverse."""
    return _ADAPTER.dump_json(manifest).decode()


def read_manifest(text: str) -> Manifest:
    """Read the text of `write_manifest`. Raises pydantic's `ValidationError` for anything else."""
    return _ADAPTER.validate_json(text)
