"""The reference judge: P(truthful) and P(informative) of an answer whose question has reference answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from locaudit.checkpoints import PACKAGED, find_checkpoint
from locaudit.errors import ConfigError
from locaudit.judges.base import Case, Judgement
from locaudit.judges.labelled import SPLIT_RULE, is_held_out
from locaudit.judges.reference.features import read_question
from locaudit.judges.reference.reader import Reader
from locaudit.judges.reference.weights import ASPECT_NAMES, BUNDLED, Weights, load_weights
from locaudit.judges.settings import ReferenceSettings
from locaudit.models import Model, load_model
from locaudit.records import content_hash
from locaudit.registry import ASPECTS

LANGUAGE_MODEL = "smollm2-135m"
"""The frozen model that reads the answers."""
N_REMEMBERED = 20_000
"""Cases whose probabilities are kept."""
GROUP = 256
"""Answers to one question that are judged together; bounds the memory."""


@dataclass(eq=False)
class Engine:
    """What the judges of one call share: weights, language model and the cases seen last."""

    weights: Weights
    device: str
    model: Model | None
    lm_fingerprint: str
    _seen: dict[Case, Sequence[float]] = field(default_factory=dict)

    def probabilities(self, cases: Sequence[Case]) -> list[Sequence[float]]:
        """P(yes) of each case for each of `ASPECT_NAMES`. Answers of one question share its prompt."""
        new: dict[tuple, list[Case]] = {}
        for case in dict.fromkeys(case for case in cases if case not in self._seen):
            new.setdefault((case.question, case.true, case.false), []).append(case)
        for group in new.values():
            for start in range(0, len(group), GROUP):
                part = group[start : start + GROUP]
                read = read_question(self.reader, self.weights.moments, part[0], [case.answer.strip() for case in part])
                self._seen |= zip(part, self.weights.probabilities(read).tolist(), strict=True)
        out = [self._seen[case] for case in cases]
        for case in list(self._seen)[:-N_REMEMBERED]:
            del self._seen[case]
        return out

    @cached_property
    def reader(self) -> Reader:
        """The language model, loaded when first asked for; in float32, so that scores do not depend on the machine."""
        return Reader(self.model or load_model(LANGUAGE_MODEL, device=self.device), self.weights.meta["layers"])


@dataclass(frozen=True, eq=False)
class ReferenceJudge:
    """One aspect of a fitted judge. Made by `load_reference_judges`."""

    aspect: str
    engine: Engine

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"reference ({self.aspect})"

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, the language model they were fitted on, and the version of the code."""
        meta, lm = self.engine.weights.meta, self.engine.lm_fingerprint
        return content_hash(["reference", self.aspect, meta["weights_sha256"], lm, meta["format"]])

    @property
    def uses_references(self) -> bool:
        """True: it compares with them."""
        return True

    def saw(self, question: str) -> bool:
        """Whether answers to the question took part in the fit, as all may where it was split by another rule."""
        return self.engine.weights.meta["split"] != SPLIT_RULE or not is_held_out(question)

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(yes) of each case. A case without any reference is missing."""
        column = ASPECT_NAMES.index(self.aspect)
        found = iter(self.engine.probabilities([case for case in cases if case.true or case.false]))
        return [
            Judgement(next(found)[column])
            if case.true or case.false
            else Judgement(None, "the question has no reference answers")
            for case in cases
        ]


def load(wanted: Mapping[str, ReferenceSettings], device: str) -> dict[str, ReferenceJudge]:
    """The judges of the kind ``reference``; those with the same weights share one language model."""
    out: dict[str, ReferenceJudge] = {}
    for folder in dict.fromkeys(settings.model for settings in wanted.values()):
        aspects = [aspect for aspect, settings in wanted.items() if settings.model == folder]
        out |= zip(aspects, load_reference_judges(aspects, weights=folder, device=device), strict=True)
    return out


def load_reference_judges(
    aspects: Sequence[str],
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    model: Model | None = None,
) -> list[ReferenceJudge]:
    """One judge an aspect (``truth``, ``info``); together they run the language model once a case.

    `weights` is a folder made by tools/judge/fit.py; None takes the bundled one. The language model loads at the first
    score; `model` (of the Llama family) takes its place when given. Raises `ConfigError` for an aspect that it was not
    fitted for, `DataError` for unusable weights and `ModelError` where the package that carries the language model is
    not installed.
    """
    for aspect in aspects:
        if ASPECTS[aspect].name not in ASPECT_NAMES:
            raise ConfigError(
                got=f"the reference judge for {aspect}",
                expected=f"one of {', '.join(ASPECT_NAMES)}, which it was fitted for",
                remedy=f"choose another kind for judges.{aspect}",
            )
    fitted = load_weights(BUNDLED if weights is None else Path(weights))
    engine = Engine(fitted, device, model, installed_language_model() if model is None else model.fingerprint)
    return [ReferenceJudge(aspect, engine) for aspect in aspects]


def installed_language_model() -> str:
    """Name and exact version of the model that is installed; raises `ModelError` when it is not."""
    find_checkpoint(LANGUAGE_MODEL)
    package, _ = PACKAGED[LANGUAGE_MODEL]
    return f"{LANGUAGE_MODEL} {package} {version(package)}"
