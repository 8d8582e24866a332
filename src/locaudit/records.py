"""What a trial leaves behind: plain values with an exact JSON round trip, no tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Arm = Literal["base", "claim", "control", "whole", "rest"]
Method = Literal["none", "iti", "optimal"]
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
    """The identity of a trial. Everything that the record depends on is in here, or hashed into `context`."""

    arm: Arm
    """What the location stands for: the claim, a random control, the whole model, the rest of it (all but
    the claim), or nothing edited (base)."""
    method: Method
    """How the edit is found."""
    location: str
    """Canonical text of the location (``"14.3,15.7"``), ``""`` for base."""
    hyperparameter: float | None
    """alpha (ITI), tau (IPO) or beta (DPO); None for base."""
    seed: int
    """Which repeat: the trial's random numbers come from `rng_seed`, a hash of the whole identity."""
    context: str
    """Hash of model, data, split, prompts and every setting that shapes results."""
    control: int = -1
    """Number of the control, from 0; -1 for the other arms."""
    registration: str = ""
    """First 16 digits of the SHA-256 of the claim file that was fixed before the run; ``""`` without one."""

    @property
    def trial_id(self) -> str:
        """Hash of the identity; the same trial has the same id in every run.

        An empty `registration` is left out, so that ids are those of runs from before there were claim files.
        """
        return content_hash({k: v for k, v in asdict(self).items() if k != "registration" or v})

    @property
    def rng_seed(self) -> int:
        """Seed of the trial's own random numbers, 0 .. 2^63 - 1.

        Method, hyperparameter and seed enter; the location does not: the claim and its controls see the same question
        order and the same initial reader, so that they differ in the location alone. Nor does the context, so that
        settings can be compared under the same order, or the registration.
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
    """``loss``: one value a step (optimal edits); empty otherwise."""
    edit: str = ""
    """File name of the saved edit inside the run folder's ``edits/``; empty for base."""

    def to_json(self) -> str:
        """Canonical JSON text; floats keep every digit."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> TrialRecord:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        raw["spec"] = TrialSpec(**raw["spec"])
        raw["questions"] = {
            split: {metric: tuple(values) for metric, values in metrics.items()}
            for split, metrics in raw["questions"].items()
        }
        raw["answers"] = {split: tuple(texts) for split, texts in raw.get("answers", {}).items()}
        raw["training"] = {key: tuple(values) for key, values in raw["training"].items()}
        return TrialRecord(**raw)
