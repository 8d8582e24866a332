"""A trial (`TrialSpec`) and its result (`TrialRecord`), as plain values without tensors."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from locaudit.location import Location

Arm = Literal["base", "claim", "control", "whole", "rest", "placebo"]
ARMS: tuple[Arm, ...] = ("base", "claim", "whole", "rest", "placebo", "control")
"""All arms, in the order of tables."""
NullId = Literal[
    "anywhere", "layers", "kv-groups", "probe-accuracy", "norm", "covariance", "uniform", "dictionary"
]  # fmt: skip
"""A null distribution: what controls have in common with the claim (`locaudit.claims.kinds.Blocks.strata`,
`locaudit.claims.directions`)."""
DIRECTION_NULLS: tuple[NullId, ...] = ("covariance", "uniform", "dictionary")
"""The nulls of claims that are directions; the first is their default."""
DIRECTIONS = "directions"
"""The null of methods whose controls are random directions at the claim."""
NO_METHOD = "none"
"""The `method` of trials of the unedited model."""
Status = Literal["ok", "diverged"]
OFF = "off:"
"""Start of the names of splits that hold off-target behaviours: ``off:sentiment``. Nothing is generated for them."""


class Place(NamedTuple):
    """One of the things compared.

    - ``Place("base")``, ``Place("claim")``, ``Place("whole")``, ``Place("rest")``
    - ``Place("control", 3, "layers")``: control 3 of the null ``layers``
    - ``Place("rest", 3, "anywhere")``: everything but control 3 of the null ``anywhere``
    - ``Place("placebo", 0)``: the claim, with an edit found from exchanged answers (`locaudit.run.placebos`)
    """

    arm: Arm
    control: int = -1
    """Number of the control among those of its null, or of the placebo, from 0; else -1."""
    null: str = ""
    """Name of the control's null: a `NullId` or `DIRECTIONS`; empty without a control."""

    @property
    def label(self) -> str:
        """The place as a key in a verdict: ``claim``, ``control layers 3``, ``rest anywhere 3`` or ``placebo 0``."""
        return self.named(" ")

    @property
    def is_rest_of_control(self) -> bool:
        """Whether it is everything but a control, and not everything but the claim."""
        return self.arm == "rest" and self.control >= 0

    def named(self, between: str, digits: int = 1) -> str:
        """Arm, null and number, as far as the place has them. The number has at least `digits` digits."""
        number = [f"{self.control:0{digits}d}"] if self.control >= 0 else []
        return between.join([self.arm, *filter(None, [self.null]), *number])


def content_hash(value: Any, length: int = 16) -> str:
    """First `length` hex digits of the SHA-256 of the value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def json_text(value: Any, indent: int = 2) -> str:
    """Nested values as indented JSON; NaN and infinite numbers become null."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any, text: Callable[[str], str] = str) -> Any:
    """Nested values for JSON: NaN and infinite numbers become None, and texts what `text` makes of them."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {text(str(key)): finite(item, text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, text) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class TrialSpec:
    """One trial: an edit to be found and scored, and the role of its location in the comparison.

    Whatever determines the edit is called the *fit*, and `trial_id` is its hash. Judges, score, level, margin and the
    numbers of controls, test questions and samples are not part of it: a run can be extended in any of them without
    repeating a fit or a measurement.
    """

    arm: Arm
    """Role of the location: the claim, a random control, the whole model, the rest (everything but the claim or a
    control), a placebo (at the claim), or base (the unedited model)."""
    method: str
    """Name of the method that finds the edit; `NO_METHOD` for base."""
    location: Location | None
    """Where the edit acts; None for base."""
    hyperparameter: float | None
    """Strength: alpha (ITI), tau (IPO) or beta (DPO); None for base and for methods without one."""
    seed: int
    """The run's training seed, different for each repeat; `rng_seed` derives the trial's own seed from it."""
    context: str
    """Hash of the model, the training questions (as token ids) and the method's settings that affect the edit."""
    control: int = -1
    """Number of the control among those of its null, or of the placebo, from 0; else -1."""
    draw: int | None = None
    """Number of the random direction, if controls are random directions at the claim; else None."""
    registration: str = ""
    """First 16 digits of the SHA-256 of the claim file that was registered before the run; empty without one."""
    null: str = ""
    """Name of the control's null: a `NullId` or `DIRECTIONS`; empty without a control."""
    measured: TrialRecord | None = field(default=None, compare=False, repr=False)
    """The trial's record if it only gets more samples (`locaudit.run.rounds`); None for a trial to be run."""

    @cached_property
    def place(self) -> Place:
        """What the trial is used for. Two nulls may draw the same location: two places with one fit."""
        return Place(self.arm, self.control, self.null)

    @cached_property
    def trial_id(self) -> str:
        """Hash of the fit: model, training questions, method and settings, location, strength and seed.

        The arm is not part of it, so the same edit has the same id in every run.
        """
        where = None if self.location is None else self.location.to_json()
        return content_hash([self.context, self.method, where, self.hyperparameter, self.seed, self.draw])

    @property
    def edit_file(self) -> str:
        """Name of its edit's file: ``claim-optimal-0.2.safetensors``, ``control-layers-03-iti-15.safetensors``."""
        arm = self.place.named("-", digits=2)
        strength = "" if self.hyperparameter is None else f"-{self.hyperparameter!r}".removesuffix(".0")
        return f"{arm}-{self.method}{strength}.safetensors"

    @property
    def rng_seed(self) -> int:
        """Seed of the trial's random numbers, 0 to 2^63 - 1: a hash of method, strength and seed.

        The location is not part of it. The claim and its controls thus see the questions in the same order and start
        from the same A, and differ in the location only. The context and the registration are not part of it either,
        so that settings can be compared under the same order.
        """
        key = {"method": self.method, "hyperparameter": self.hyperparameter, "seed": self.seed}
        return int(content_hash(key), 16) >> 1


class Packed(Mapping[str, tuple[float, ...]]):
    """Metric -> one value per question, like a dict of tuples, but with 8 bytes a value instead of 32."""

    def __init__(self, columns: Mapping[str, bytes]):
        self.columns = columns
        """Metric -> its values as little-endian float64."""

    @classmethod
    def of(cls, metrics: Mapping[str, Sequence[float]], n: int) -> Packed:
        """Pack metrics of `n` questions. Raises `ValueError` if one has another number of values."""
        if wrong := [metric for metric, values in metrics.items() if len(values) != n]:
            raise ValueError(f"got {wrong[0]} of {len(metrics[wrong[0]])} questions, expected {n} values")
        return cls({metric: struct.pack(f"<{n}d", *values) for metric, values in metrics.items()})

    def __getitem__(self, metric: str) -> tuple[float, ...]:
        packed = self.columns[metric]
        return struct.unpack(f"<{len(packed) // 8}d", packed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class TrialRecord:
    """The result of one trial.

    Wall-clock times are no part of it, so equal trials have equal records.
    """

    spec: TrialSpec
    status: Status
    """``ok``, or ``diverged`` if a loss, edit or score became NaN or infinite; such a record has no scores."""
    message: str = ""
    """Why the trial diverged."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """split (``val``, ``test``, ``off:NAME``) -> metric -> mean over questions."""
    drift: Mapping[str, float] = field(default_factory=dict)
    """``kl`` and ``ce`` on the fixed documents, in nats per token."""
    questions: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """split -> metric -> one value per question, in the split's order."""
    answers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """split -> the edited model's greedy answer to each question, in the split's order; empty if none was generated.
    How judges rate the answers is stored separately (`locaudit.store`), because judges can be added later."""
    samples: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """split -> samples 1, 2, ...: the sampled answer to each question. More than one only on test questions, of the
    trial chosen at each place."""
    training: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """``loss`` -> one value per training step; empty if the edit was not trained. Other numbers about the fit have one
    value each: ``objective`` and ``change`` (`locaudit.methods.training.progress`), ``alpha`` of ITI by dose."""
    edit: str = ""
    """File name of the saved edit inside the run folder's ``edits/`` (`TrialSpec.edit_file`; of a run by an earlier
    version, its id); empty for base."""
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False, repr=False)
    """Wall-clock seconds of the parts that were just run: ``edit`` (finding it, and its drift), ``score``, ``answer``,
    ``sample`` (further samples). Stored separately (`Store.parts`); empty in a record that was read."""

    def said(self, split: str) -> tuple[tuple[str, ...], ...]:
        """The greedy answers to a split's questions, then each sample's; empty if none was generated."""
        return (self.answers[split], *self.samples.get(split, ())) if split in self.answers else ()

    def __repr__(self) -> str:
        spec, scores = self.spec, self.metrics.get("test", {})
        arm = f"{spec.null} control {spec.control}" if spec.arm == "control" else spec.place.label
        strength = "" if spec.hyperparameter is None else f", strength {spec.hyperparameter:g}"
        said = ", ".join(f"{name} {value:.3f}" for name, value in scores.items()) or self.message
        return f"TrialRecord({arm}, {spec.method}{strength}, {self.status}: {said})"


def mean_metrics(questions: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Average over questions: split -> metric -> mean. Sums are exactly rounded, the same on every machine."""
    return {
        split: {metric: math.fsum(values) / len(values) for metric, values in metrics.items()}
        for split, metrics in questions.items()
    }
