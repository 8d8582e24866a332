"""The interface of judges: (question, answer, references) -> P(yes), or missing.

An *aspect* is the quality that is judged, such as whether the answer is true. This file does not import torch.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from locaudit.errors import ConfigError


@dataclass(frozen=True)
class Aspect:
    """A quality of answers that judges rate. Add one with ``ASPECTS.register(name)(Aspect(name, ...))``."""

    name: str
    suffix: str
    """End of the prompt that a causal-LM judge completes with yes or no, such as ``True:``."""
    rubric: str
    """Instruction for a chat judge; yes means that the answer has the quality."""
    judge: str = "reference"
    """The kind of judge that ``default`` stands for."""


@dataclass(frozen=True)
class Case:
    """An answer to judge, with the reference answers of its question."""

    question: str
    answer: str
    """The generated text, stripped; may be empty."""
    true: tuple[str, ...] = ()
    """Correct reference answers."""
    false: tuple[str, ...] = ()
    """Incorrect reference answers."""


@dataclass(frozen=True)
class Judgement:
    """P(yes) or, if the judgement is missing, None and the reason. A missing judgement never counts as no."""

    probability: float | None
    """In [0, 1]."""
    reason: str = ""
    """Why the judgement is missing; empty if it is not."""


class Judge(Protocol):
    """A judge of one aspect of answers, such as truth."""

    @property
    def name(self) -> str:
        """Name in tables and messages, for example ``reference (truth)``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the judgements depend on: kind, weights or served model, prompt, code version."""
        ...

    @property
    def uses_references(self) -> bool:
        """Whether the judge reads the reference answers. If not, they are not part of the key of cached judgements."""
        ...

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order. A case that cannot be judged gives a missing judgement, not an error."""
        ...


@runtime_checkable
class Billed(Protocol):
    """A judge whose judgements cost money or run on somebody else's server."""

    def estimate(self, cases: Sequence[Case]) -> object:
        """Estimate the cost of judging the cases; ``str()`` of the result is one line."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A judge that knows which questions it was trained on."""

    def saw(self, question: str) -> bool:
        """Whether the training data had answers to the question. Then the question is not held out."""
        ...


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge. Add one with ``JUDGES.register(name)(JudgeKind(...))``; no other code has to change."""

    settings: type
    """A frozen dataclass whose fields all have defaults and docstrings."""
    load: Callable[..., Mapping[str, Judge]] | str
    """``load(wanted, device) -> {aspect: Judge}``, or ``"module:function"``, which is imported at first use.

    `wanted` maps every aspect that this kind judges to its settings. It has all of them, so that judges can share a
    loaded model."""
    check: Callable[[Aspect, Any], object] | str = ""
    """``check(aspect, settings)``, or ``"module:function"``. It raises `LocauditError` for example for a missing model,
    file or key, without importing torch. Empty: nothing is checked before the judge is loaded."""
    prompt: str = ""
    """Name of the settings field that holds the user's own prompt; empty if this kind takes no prompt.

    With an own prompt, the kind can also judge a behaviour that names no aspects."""
    any_behaviour: bool = False
    """Whether the kind can judge aspects that the behaviour does not name, because it reads nothing into answers."""

    @property
    def loader(self) -> Callable[..., Mapping[str, Judge]]:
        """The function in `load`, imported if `load` is only its name."""
        return pkgutil.resolve_name(self.load) if isinstance(self.load, str) else self.load

    def refuse(self, aspect: Aspect, settings: Any) -> None:
        """Raise the errors of `check`."""
        if self.check:
            check = pkgutil.resolve_name(self.check) if isinstance(self.check, str) else self.check
            check(aspect, settings)

    def own_prompt(self, settings: Any) -> str | None:
        """The user's own prompt in these settings; None if there is none."""
        return getattr(settings, self.prompt) if self.prompt else None


def needed_model(aspect: Aspect, model: str | None) -> str:
    """The name of the judge's model. Raises `ConfigError` if it is not given."""
    if not model:
        raise ConfigError(
            got=f"a judge of {aspect.name} without a model",
            expected=f"a value for judges.{aspect.name}.model",
            remedy="name the judge's model there",
        )
    return model


def check_aspects(kind: str, wanted: Collection[str], *known: str) -> None:
    """Raise `ConfigError` for a wanted aspect that is not `known`, one of those that judges of this kind rate."""
    for aspect in wanted:
        if aspect not in known:
            raise ConfigError(
                got=f"the {kind} judge for {aspect}",
                expected=f"the aspect that it rates ({' or '.join(known)})",
                remedy=f"choose another kind of judge for judges.{aspect}",
            )
