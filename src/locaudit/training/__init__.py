"""Optimal edits: objectives over answer pairs and one loop for K edits."""

from locaudit.training.loop import BATCH_SIZES, Batching, Fit, Job, TrainingData, step_size, train
from locaudit.training.objectives import (
    LEARNING_RATES,
    Objective,
    Reduction,
    default_learning_rate,
    log_ratios,
    pair_loss,
)
from locaudit.training.optimizers import OptimizerName, make_optimizer, resolve_optimizer
from locaudit.training.parameters import Reader, TrainableEdit, stack_trainable

__all__ = [
    "BATCH_SIZES",
    "LEARNING_RATES",
    "Batching",
    "Fit",
    "Job",
    "Objective",
    "OptimizerName",
    "Reader",
    "Reduction",
    "TrainableEdit",
    "TrainingData",
    "default_learning_rate",
    "log_ratios",
    "make_optimizer",
    "pair_loss",
    "resolve_optimizer",
    "stack_trainable",
    "step_size",
    "train",
]
