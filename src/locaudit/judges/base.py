"""What a judge is: (question, answer, references) -> P(yes), or missing.

An *aspect* is what is asked of an answer, such as whether it is true. No torch here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from locaudit.errors import ConfigError


@dataclass(frozen=True)
class Aspect:
    """One thing that is asked of an answer. Add one with ``ASPECTS.register(name)(Aspect(name, ...))``."""

    name: str
    suffix: str
    """What a causal-LM judge completes."""
    rubric: str
    """What a chat judge is told; a yes means that the answer has the quality."""


@dataclass(frozen=True)
class Case:
    """An answer to be judged, with the references of its question."""

    question: str
    answer: str
    """As generated, stripped; may be empty."""
    true: tuple[str, ...] = ()
    """Reference answers that are wanted."""
    false: tuple[str, ...] = ()
    """Reference answers that are not."""


@dataclass(frozen=True)
class Judgement:
    """P(yes), or None with the reason why it is missing. A missing judgement is never a no."""

    probability: float | None
    """In [0, 1]."""
    reason: str = ""
    """Why there is no probability; empty when there is one."""


class Judge(Protocol):
    """One judge of one aspect."""

    @property
    def name(self) -> str:
        """What tables and messages call it, for example ``reference (truth)``."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of all that its judgements depend on: kind, weights or served model, prompt, version."""
        ...

    @property
    def uses_references(self) -> bool:
        """Whether the references of a case matter to it; if not, they are no part of a judgement's address."""
        ...

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement a case, in order. A case that cannot be judged is missing; it does not raise."""
        ...


@runtime_checkable
class Billed(Protocol):
    """A judge whose judgements cost money or other people's machines."""

    def estimate(self, cases: Sequence[Case]) -> object:
        """What judging the cases would take; its text is one line."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A judge that knows which questions it was fitted on."""

    def saw(self, question: str) -> bool:
        """Whether answers to the question took part in its fit, so that they cannot measure it."""
        ...


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge. Add one with ``JUDGES.register(name)(JudgeKind(...))``: nothing else names it."""

    settings: type
    """A frozen dataclass whose fields all have defaults and docstrings."""
    load: Callable[..., Mapping[str, Judge]] | str
    """``load(wanted, device) -> {aspect: Judge}``, where `wanted` maps all aspects that share the kind to their
    settings, so that judges can share what they load; or ``"module:function"``, imported when first used."""
    prompt: str = ""
    """Field of the settings that holds a prompt of the user's own, with which the kind judges behaviours that name
    nothing to judge. Empty: it has none."""

    @property
    def loader(self) -> Callable[..., Mapping[str, Judge]]:
        """The function behind `load`."""
        if not isinstance(self.load, str):
            return self.load
        module, _, name = self.load.partition(":")
        return getattr(importlib.import_module(module), name)

    def own_prompt(self, settings: Any) -> str | None:
        """The user's own prompt in these settings, if any."""
        return getattr(settings, self.prompt) if self.prompt else None


def needed_model(aspect: Aspect, model: str | None) -> str:
    """The model; `ConfigError` where a kind that needs one is given none."""
    if not model:
        raise ConfigError(
            got=f"a judge of {aspect.name} without a model",
            expected=f"judges.{aspect.name}.model",
            remedy="name the judge's model",
        )
    return model


def import_extra(package: str) -> Any:
    """A package of the extra ``judge``; `ConfigError` names the extra to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            got=f"a judge that needs the package {package}, which is not installed",
            expected="the extra judge installed",
            remedy="run: pip install 'locaudit[judge]'",
        ) from None
