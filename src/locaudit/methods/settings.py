"""Settings of the built-in methods, with their defaults. This file does not import torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, PlainValidator

from locaudit.config.choices import find
from locaudit.config.validation import Count, Grid, Positive, PositiveGrid, checked
from locaudit.errors import ConfigError
from locaudit.location import Positions
from locaudit.registry import OBJECTIVES

Direction = Literal["mass_mean", "probe", "random"]
Reader = Literal["layer", "location"]
Reduction = Literal["sum", "mean"]
Batching = Literal["question", "pair"]
HORIZONS = (2, 4, 8, 16)
"""Numbers of epochs that ``epochs: auto`` tries, in order."""
OptimizerName = Literal["auto", "adamw", "paged_adamw_32bit"]


def _auto_or_count(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("auto or a number of at least 1; change it")
    return value


def _registered(objective: str) -> str:
    try:
        find(OBJECTIVES, objective, "objective")
    except ConfigError as error:
        raise ValueError(f"{error.expected}; {error.remedy}") from None
    return objective


@checked
class ITISettings:
    """ITI (inference-time intervention): h' = h + alpha sigma u, with a direction u and the spread sigma along it."""

    direction: Direction = "mass_mean"
    """Direction u of each unit. ``mass_mean``: difference of the class means. ``probe``: weights of its probe.
    ``random``: a random direction."""
    alphas: Grid = (5.0, 10.0, 15.0, 20.0)
    """Strengths alpha to try. The best one on validation questions is scored on test questions."""
    doses: PositiveGrid | None = None
    """KL budgets to try instead of alphas, in nats per token, such as 0.05 0.1 0.2 0.4 (None: alphas).
    At each place the alpha with that KL is found, so that places are compared at equal KL."""
    positions: Positions = "answer"
    """Which tokens are edited. ``all``: every token. ``prompt``: those before the answer.
    ``answer``: the last prompt token and all after it (as ITI does when it generates).
    ``last``: the last prompt token. ``subject``: the last token of the subject that each question marks."""


@checked
class TrainingSettings:
    """Settings of the methods that train edits."""

    objective: Annotated[str, AfterValidator(_registered)] = "ipo"
    """Loss over pairs of a true and a false answer: ``ipo``, ``dpo``, or one added by a plug-in."""
    reduction: Reduction = "sum"
    """How the log-ratios of an answer's tokens are combined: ``sum`` (as in the paper), ``mean`` (as in TRL)."""
    strengths: PositiveGrid = (0.1, 0.2, 0.3, 0.4, 0.5)
    """Values of IPO's tau or DPO's beta to try. The best one on validation questions is scored on test questions."""
    batching: Batching = "question"
    """Whether a training step uses questions with all their answer pairs, or single answer pairs (as in the paper)."""
    batch_size: Count | None = None
    """Number of questions or pairs per training step (None: 2 questions, or 4 pairs as in the paper)."""
    epochs: Annotated[Literal["auto"] | int, PlainValidator(_auto_or_count)] = "auto"
    """Number of passes over the training questions or pairs (2 in the paper).
    ``auto``: 2, 4, 8 or 16, the first whose doubling gains less than 2 % of the objective.
    It is found before the first trial, at the claim and in the whole model."""
    positions: Positions = "all"
    """Which tokens are edited, in training and after.
    ``all`` (as in the paper), ``prompt``, ``answer``, ``last`` or ``subject``: as in ITI's settings."""
    max_questions: Count | None = None
    """Use at most this many training questions to train edits (None: all). Probes and ITI always use all of them."""
    learning_rate: Positive | None = None
    """Peak learning rate (None: by batching, pairs in a step and size of the place, see docs/learning-rates.md)."""
    max_grad_norm: Positive = 1.0
    """The gradient of each edit is clipped to this norm. The default is that of transformers' Trainer."""
    optimizer: OptimizerName = "adamw"
    """``adamw``, or the paper's ``paged_adamw_32bit``, which needs CUDA and the package bitsandbytes.
    ``auto``: the paged one if it is available, else ``adamw``."""
    bank_size: Count | None = None
    """Number of edits trained together in one batch.
    None: one on a CPU; on a GPU, as many as fit into half of its free memory (measured on the first edit)."""


@checked
class OptimalSettings(TrainingSettings):
    """The optimal edit of a location: a trained low-rank update that changes only the location."""

    rank: Count = 1
    """Rank r of the update h' = h + B A h. The paper uses 1."""
    reader: Reader = "layer"
    """What A reads: the whole vector h of the ``layer`` (as in the paper), or only the ``location``."""


@checked
class ConstantSettings(TrainingSettings):
    """The optimal constant at a location (in a footnote of the paper): h' = h + b with trained b."""


@checked
class AblateSettings:
    """Mean ablation: the location's activations are replaced by their mean over the training texts. No settings."""


@checked
class GivenSettings:
    """Your own edit, such as a steering vector: a file written with `Edit.save`, or a control vector in GGUF."""

    file: str | None = None
    """Path of the edit's file."""

    @property
    def positions(self) -> Positions:
        """The positions of the file's edit; ``all`` for a control vector, and for a file that cannot be read."""
        from safetensors import SafetensorError, safe_open

        with suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(str(self.file), "numpy") as file:
            return json.loads((file.metadata() or {})["locaudit"])["positions"]
        return "all"

    def check(self) -> None:
        """Raise `ConfigError` if no file is named, or if it is not there."""
        if self.file is None or not Path(self.file).is_file():
            raise ConfigError(
                got="no file" if self.file is None else f"{self.file}, which is not a file",
                expected="a file with an edit, written by Edit.save, or a control vector (.gguf)",
                remedy="set methods.given.file to its path",
            )
