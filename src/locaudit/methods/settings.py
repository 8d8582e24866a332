"""Settings of each built-in method, every default once. No torch here."""

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
    """Inference-time intervention: h + alpha sigma u."""

    direction: Direction = "mass_mean"
    """u: difference of the class means, the probe's weights, or random; unit norm for each unit."""
    alphas: Grid = (5.0, 10.0, 15.0, 20.0)
    """Strengths tried; the best on validation is scored on test."""
    positions: Positions = "answer"
    """Tokens edited: all, or from the last prompt token on (what ITI does while decoding)."""


@checked
class TrainingSettings:
    """How edits are trained."""

    objective: str = "ipo"
    """Loss over (true, false) answer pairs: ``ipo``, ``dpo``, or one that a plug-in adds."""
    reduction: Reduction = "sum"
    """Log-ratio of an answer: summed over its tokens (the paper) or averaged (TRL's IPO)."""
    strengths: PositiveGrid = (0.1, 0.2, 0.3, 0.4, 0.5)
    """tau of IPO (or beta of DPO); the best on validation is scored on test."""
    batching: Batching = "question"
    """A step takes questions with all their pairs, or single pairs (the paper)."""
    batch_size: Count | None = None
    """Questions or pairs a step; None: 2 questions, or the paper's 4 pairs."""
    epochs: Count = 2
    """Passes over the training questions or pairs."""
    max_questions: Count | None = None
    """Train on at most this many of the training questions; probes and ITI read them all (None: all)."""
    learning_rate: Positive | None = None
    """None: by batching, kind and size of the location (`locaudit.methods.objectives.default_learning_rate`)."""
    max_grad_norm: Positive = 1.0
    """Gradients of each edit are clipped to this norm (the default of transformers' Trainer)."""
    optimizer: OptimizerName = "adamw"
    """AdamW, or its paged form, the paper's, which needs bitsandbytes and CUDA; ``auto``: the paged one if it can."""
    bank_size: Count | None = None
    """Edits trained together as rows of one batch; None: one on a CPU; on a GPU, as many as half of its free memory
    holds, by the peak of the first."""


@checked
class OptimalSettings(TrainingSettings):
    """The best edit of a location: trained, masked to it."""

    rank: Count = 1
    """r of h' = h + B A h; 1 is the paper's."""
    reader: Reader = "layer"
    """What A reads: the whole layer (the paper), or the location alone."""


@checked
class ConstantSettings(TrainingSettings):
    """The best constant at a location (the paper's footnote): h' = h + b, b trained."""


@checked
class AblateSettings:
    """Mean ablation: the location's activations become their mean over training tokens. It has no settings."""


@checked
class GivenSettings:
    """An edit from a file: a steering vector, an ITI bias, an adapter."""

    file: str | None = None
    """The edit, a safetensors file as `Edit.save` writes it."""
