"""What a trial is and what it leaves behind: plain values, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from locaudit.location import Location

Arm = Literal["base", "claim", "control", "whole", "rest"]
ARMS: tuple[Arm, ...] = ("base", "claim", "whole", "rest", "control")
"""In the order of tables."""
NO_METHOD = "none"
"""Method of the unedited model."""
Status = Literal["ok", "diverged"]


def content_hash(value: Any, length: int = 16) -> str:
    """First `length` hex digits of the SHA-256 of the value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def json_text(value: Any, indent: int = 2) -> str:
    """Indented JSON of nested values; a number that is missing (NaN, infinite) is null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TrialSpec:
    """One trial: what its place stands for, and the *fit*, all that gives its edit.

    Judges, score, level, margin, numbers of controls, of test questions and of samples are in no identity: a run can
    grow in any of them without repeating a fit or a measurement.
    """

    arm: Arm
    """What the location stands for: the claim, a random control, the whole model, the rest of it (all but
    the claim), or nothing edited (base)."""
    method: str
    """How the edit is found; `NO_METHOD` for base."""
    location: Location | None
    """None for base."""
    hyperparameter: float | None
    """Strength: alpha (ITI), tau (IPO) or beta (DPO); None for base and for methods without one."""
    seed: int
    """Which repeat: the trial's random numbers come from `rng_seed`."""
    context: str
    """Hash of model, training questions as token ids, and the method's settings that shape an edit."""
    control: int = -1
    """Number of the control, from 0; -1 for the other arms."""
    draw: int | None = None
    """Number of the random direction, where controls are directions at the claim; else None."""
    registration: str = ""
    """First 16 digits of the SHA-256 of the claim file that was fixed before the run; ``""`` without one."""

    @property
    def trial_id(self) -> str:
        """Hash of the fit: model, training questions, method and settings, location, strength, seed.

        What the location stands for is not in it: the same edit has the same id in every run.
        """
        where = None if self.location is None else self.location.to_json()
        return content_hash([self.context, self.method, where, self.hyperparameter, self.seed, self.draw])

    @property
    def edit_file(self) -> str:
        """Name of its edit's file: ``claim-optimal-0.2.safetensors``, ``control-03-iti-15.safetensors``."""
        arm = f"{self.arm}-{self.control:02d}" if self.arm == "control" else self.arm
        strength = "" if self.hyperparameter is None else f"-{self.hyperparameter!r}".removesuffix(".0")
        return f"{arm}-{self.method}{strength}.safetensors"

    @property
    def rng_seed(self) -> int:
        """Seed of the trial's own random numbers, 0 .. 2^63 - 1.

        Method, strength and seed enter; the location does not: the claim and its controls see the same question order
        and the same initial reader, so that they differ in the location alone. Nor does the context, so that settings
        can be compared under the same order, or the registration.
        """
        key = {"method": self.method, "hyperparameter": self.hyperparameter, "seed": self.seed}
        return int(content_hash(key), 16) >> 1


@dataclass(frozen=True)
class TrialRecord:
    """The outcome of one trial. Wall-clock times are kept apart, so that equal trials have equal records."""

    spec: TrialSpec
    status: Status
    """``diverged``: a loss, edit or score became NaN or infinite; such a record has no scores and a `message`."""
    message: str = ""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """split (``val``, ``test``) -> metric -> mean over questions."""
    drift: Mapping[str, float] = field(default_factory=dict)
    """``kl`` and ``ce`` in nats per token on the fixed documents."""
    questions: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """split -> metric -> one value a question, in the split's order."""
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """split -> what the edited model says to each question, in the split's order; empty if nothing was generated.
    Judgements of it are kept apart (`locaudit.store`), since judges come and go."""
    training: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """``loss``: one value a step (trained edits); empty otherwise."""
    edit: str = ""
    """File name of the saved edit inside the run folder's ``edits/`` (`TrialSpec.edit_file`; of a run by an earlier
    version, its id); empty for base."""


def mean_metrics(questions: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Split -> metric -> mean over questions, exactly rounded: the same wherever it is computed."""
    return {
        split: {metric: math.fsum(values) / len(values) for metric, values in metrics.items()}
        for split, metrics in questions.items()
    }
