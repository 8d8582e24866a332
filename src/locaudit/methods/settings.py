"""Settings of the built-in methods, with their defaults. This file does not import torch."""

from __future__ import annotations

from typing import Literal

from locaudit.config.validation import Count, Grid, Positive, PositiveGrid, checked

Positions = Literal["all", "answer"]
Direction = Literal["mass_mean", "probe", "random"]
Reader = Literal["layer", "location"]
Reduction = Literal["sum", "mean"]
Batching = Literal["question", "pair"]
OptimizerName = Literal["auto", "adamw", "paged_adamw_32bit"]


@checked
class ITISettings:
    """Inference-time intervention: h' = h + alpha sigma u."""

    direction: Direction = "mass_mean"
    """Direction u of each unit: difference of the class means, the probe's weights, or random."""
    alphas: Grid = (5.0, 10.0, 15.0, 20.0)
    """Strengths alpha to try; the best one on validation questions is scored on test questions."""
    positions: Positions = "answer"
    """Tokens that are edited: all, or those from the last prompt token on (as ITI does while decoding)."""


@checked
class TrainingSettings:
    """Settings of the methods that train edits."""

    objective: str = "ipo"
    """Loss over pairs of a true and a false answer: ``ipo``, ``dpo``, or one added by a plug-in."""
    reduction: Reduction = "sum"
    """Log-ratio of an answer: sum over its tokens (as in the paper) or mean (as in TRL's IPO)."""
    strengths: PositiveGrid = (0.1, 0.2, 0.3, 0.4, 0.5)
    """Values of IPO's tau (or DPO's beta) to try; the best one on validation questions is scored on test questions."""
    batching: Batching = "question"
    """Whether a training step takes whole questions, with all their pairs, or single pairs (as in the paper)."""
    batch_size: Count | None = None
    """Questions or pairs per training step; None: 2 questions, or the paper's 4 pairs."""
    epochs: Count = 2
    """Passes over the training questions or pairs."""
    max_questions: Count | None = None
    """Train edits on at most this many training questions (None: all). Probes and ITI always use all of them."""
    learning_rate: Positive | None = None
    """Peak learning rate; None: chosen by `batching` and the location's size (see docs/learning-rates.md)."""
    max_grad_norm: Positive = 1.0
    """Each edit's gradient is clipped to this norm; 1.0 is the default of transformers' Trainer."""
    optimizer: OptimizerName = "adamw"
    """AdamW, or the paper's paged AdamW, which needs bitsandbytes and CUDA; ``auto``: the paged one if available."""
    bank_size: Count | None = None
    """Number of edits trained together as rows of one batch. None: one on a CPU; on a GPU, as many as fit into half of
    its free memory, judged by the peak memory of training the first edit."""


@checked
class OptimalSettings(TrainingSettings):
    """The optimal edit of a location: a trained low-rank update that writes only there."""

    rank: Count = 1
    """Rank r of the update h' = h + B A h; the paper uses 1."""
    reader: Reader = "layer"
    """What A reads: the whole vector of the layer (as in the paper), or only the location."""


@checked
class ConstantSettings(TrainingSettings):
    """The optimal constant at a location (the paper's footnote): h' = h + b with trained b."""


@checked
class AblateSettings:
    """Mean ablation: the location's activations become their mean over the training texts. No settings."""


@checked
class GivenSettings:
    """An edit of your own, such as a steering vector, from a file that `Edit.save` wrote."""

    file: str | None = None
    """Path of the edit's file."""
