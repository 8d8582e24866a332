"""Choose bank sizes (how many edits are trained or scored at once) if the settings do not say them."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from locaudit.config import AuditConfig
from locaudit.location import Location
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest
from locaudit.methods import Job
from locaudit.methods.training import PART_TOKENS, TrainingData, step_size
from locaudit.models.memory import copies_that_fit, of_device
from locaudit.models.model import Model
from locaudit.registry import METHODS
from locaudit.run.plan import Banks

SCORING_BANK = {"cpu": 4, "cuda": 32}
"""Device -> edits scored at once. Decoding a few rows takes about as long as decoding one."""
MAX_BANK = 64
"""Largest number of edits trained at once."""
N_TRIED = 32
"""Number of training questions among which the longest are used to measure memory."""


def bank_sizes(config: AuditConfig, model: Model, train: Forest) -> Banks:
    """(edits trained together, edits scored together): from the settings, or else from the device and its memory."""
    trained = [(METHODS[name], settings) for name, settings in config.methods.items() if METHODS[name].trained]
    sizes = [
        settings.bank_size or _training_bank(method.fitter, settings, model, train) for method, settings in trained
    ]
    return min(sizes, default=1), config.evaluation.bank_size or of_device(SCORING_BANK, model.device)


def with_banks(config: AuditConfig, banks: Banks) -> AuditConfig:
    """The settings with these bank sizes filled in."""
    methods = {
        name: replace(settings, bank_size=banks[0]) if METHODS[name].trained else settings
        for name, settings in config.methods.items()
    }
    return replace(config, methods=methods, evaluation=replace(config.evaluation, bank_size=banks[1]))


def _training_bank(fit: Any, settings: Any, model: Model, train: Forest) -> int:
    """Number of edits to train at once: 1 on a CPU, where larger banks are not faster; more on a GPU.

    On a GPU, the peak memory per edit is measured in one training step of a whole-model edit on long questions. The
    bank is as large as memory allows, but not larger than needed to keep the GPU busy (`PART_TOKENS` per step).
    """
    if model.device.type != "cuda":
        return 1
    trees = sorted(train.trees[:N_TRIED], key=len)
    size = step_size(settings.batching, settings.batch_size)
    longest = Forest(train.prefix, tuple(trees[-size:]))
    data = TrainingData(
        longest,
        (1,) * len(longest.trees),
        tuple(torch.zeros(len(tree.branches)) for tree in longest.trees),  # memory does not depend on the values
    )
    shared = SimpleNamespace(
        model=model, training=data, residuals={"train": Residuals(model, longest)}, row_tokens=None
    )
    jobs = [Job(Location.whole(), settings.strengths[0], 0)]
    fitting = copies_that_fit(model, lambda: fit(shared, jobs, replace(settings, epochs=1)))
    step_tokens = size * sum(map(len, trees)) / len(trees) + len(train.prefix)
    return max(1, min(fitting, math.ceil(of_device(PART_TOKENS, model.device) / step_tokens), MAX_BANK))
