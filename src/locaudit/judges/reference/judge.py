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
from locaudit.judges.reference.features import read_question
from locaudit.judges.reference.reader import Reader
from locaudit.judges.reference.weights import ASPECT_NAMES, BUNDLED, Weights, load_weights
from locaudit.judges.settings import ReferenceSettings
from locaudit.models import Model, load_model
from locaudit.records import content_hash
from locaudit.registry import ASPECTS

LANGUAGE_MODEL = "smollm2-135m"
"""The frozen language model that reads the answers."""
N_REMEMBERED = 20_000
"""Number of cases whose probabilities are kept in memory."""
GROUP = 256
"""Number of answers to one question that are judged together; bounds memory."""


@dataclass(eq=False)
class Engine:
    """What the judges of all aspects share: weights, language model and recent results."""

    weights: Weights
    device: str
    model: Model | None
    lm_fingerprint: str
    _seen: dict[Case, Sequence[float]] = field(default_factory=dict)

    def probabilities(self, cases: Sequence[Case]) -> list[Sequence[float]]:
        """P(yes) of each case, for each of `ASPECT_NAMES`. Answers to one question are read together."""
        new: dict[tuple, list[Case]] = {}
        for number, case in enumerate(dict.fromkeys(case for case in cases if case not in self._seen)):
            new.setdefault((number // GROUP, case.question, case.true, case.false), []).append(case)
        for group in new.values():
            read = read_question(self.reader, self.weights.moments, group[0], [case.answer.strip() for case in group])
            self._seen |= zip(group, self.weights.probabilities(read, group[0].question).tolist(), strict=True)
        out = [self._seen[case] for case in cases]
        self._seen = dict(list(self._seen.items())[-N_REMEMBERED:])
        return out

    @cached_property
    def reader(self) -> Reader:
        """The language model, loaded at first use; in float32, so that scores do not depend on the machine."""
        return Reader(self.model or load_model(LANGUAGE_MODEL, device=self.device), self.weights.meta["layers"])


@dataclass(frozen=True, eq=False)
class ReferenceJudge:
    """A fitted judge of one aspect. Made by `load_reference_judges`.

    It is cross-fitted: no network judges answers to a question that it was fitted on.
    """

    aspect: str
    engine: Engine

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return f"reference ({self.aspect})"

    @property
    def fingerprint(self) -> str:
        """Hash of the aspect, the fitted weights, the language model and the version of the code."""
        meta, lm = self.engine.weights.meta, self.engine.lm_fingerprint
        return content_hash(["reference", self.aspect, meta["weights_sha256"], lm, meta["format"]])

    @property
    def uses_references(self) -> bool:
        """True: it compares answers with the references."""
        return True

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(yes) of each case; missing if its question has no references."""
        column = ASPECT_NAMES.index(self.aspect)
        asked = [case for case in cases if case.true or case.false]
        found = dict(zip(asked, self.engine.probabilities(asked), strict=True))
        missing = Judgement(None, "the question has no reference answers")
        return [Judgement(found[case][column]) if case in found else missing for case in cases]


def load(wanted: Mapping[str, ReferenceSettings], device: str) -> dict[str, ReferenceJudge]:
    """Load the judges of kind ``reference``: aspect -> judge. Those with the same weights share one language model."""
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
    """Load one judge per aspect (``truth``, ``info``). Together they run the language model once per case.

    `weights` is a folder made by tools/judge/fit.py (None: the bundled judge). The language model is loaded at the
    first score; `model`, of the Llama family, replaces it.

    Raises `ConfigError` for an aspect that the judge was not fitted for, `DataError` for unusable weights, `ModelError`
    if the package that contains the language model is not installed.
    """
    for aspect in aspects:
        if ASPECTS[aspect].name not in ASPECT_NAMES:
            raise ConfigError(
                got=f"the reference judge for {aspect}",
                expected=f"an aspect that it was fitted for ({', '.join(ASPECT_NAMES)})",
                remedy=f"choose another kind of judge for judges.{aspect}",
            )
    fitted = load_weights(BUNDLED if weights is None else Path(weights))
    engine = Engine(fitted, device, model, installed_language_model() if model is None else model.fingerprint)
    return [ReferenceJudge(aspect, engine) for aspect in aspects]


def installed_language_model() -> str:
    """Name and exact version of the installed language model; `ModelError` if it is not installed."""
    find_checkpoint(LANGUAGE_MODEL)
    package, _ = PACKAGED[LANGUAGE_MODEL]
    return f"{LANGUAGE_MODEL} {package} {version(package)}"
