"""What a run folder says about itself: model, data, claim, training, machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from locaudit.location import Location
from locaudit.methods.objectives import default_learning_rate
from locaudit.methods.optimizers import resolve_optimizer
from locaudit.methods.probes import Probes
from locaudit.methods.training import step_size
from locaudit.models import Model
from locaudit.records import TrialSpec
from locaudit.run.inputs import Inputs
from locaudit.stats.sequential import MOST_CONTROLS
from locaudit.store import Store


def note_facts(
    store: Store,
    model: Model,
    inputs: Inputs,
    claim: Location,
    probes: Probes,
    groups: Sequence[Sequence[TrialSpec]],
    population: int,
) -> None:
    """Write the facts ``probes`` and ``run``; reports read them."""
    store.set_fact(
        "probes",
        {
            "kind": probes.kind,
            "val_accuracy": probes.val_accuracy.tolist(),
            "majority": probes.majority,
            "n_train": probes.n_train,
            "n_val": probes.n_val,
            "context": store.config.probe.context,
            "units": [list(unit) for unit in probes.ranking()[: max(len(claim), store.config.probe.top_k)]],
        },
    )
    questions = inputs.behaviour.questions
    store.set_fact(
        "run",
        {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "n_layers": model.n_layers,
            "n_heads": model.n_heads,
            "head_dim": model.head_dim,
            "n_units": model.n_layers * model.n_units(claim.kind),
            "behaviour": inputs.behaviour.name,
            "asks": [inputs.behaviour.target, inputs.behaviour.retention],
            "n_questions": {name: len(getattr(inputs.split, name)) for name in ("train", "val", "test")},
            "data": {
                "questions": len(questions),
                "true": sum(len(question.true) for question in questions),
                "false": sum(len(question.false) for question in questions),
            },
            "training": _describe_training(model, inputs, claim),
            "planned": sum(map(len, groups)),
            "n_controls": 1 + max(spec.control for group in groups for spec in group),
            "population": population if population <= MOST_CONTROLS else None,
            "claim": str(claim),
            "claim_source": "top-k probed heads" if inputs.claim is None else "given",
            "versions": {
                "locaudit": metadata.version("locaudit"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": metadata.version("transformers"),
            },
            "device": describe_device(model.device),
            "dtype": str(model.lm.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
    )


def describe_device(device: torch.device) -> str:
    """The device as torch names it, with the name of a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _describe_training(model: Model, inputs: Inputs, claim: Location) -> dict[str, Any]:
    """How optimal edits are trained here."""
    settings = inputs.config.optimal
    questions = inputs.split.train[: settings.max_questions]
    n_pairs = sum(len(question.true) * len(question.false) for question in questions)
    whole = model.n_layers * model.n_units(claim.kind)
    rate = settings.learning_rate
    size = step_size(settings.batching, settings.batch_size)
    n_items = n_pairs if settings.batching == "pair" else len(questions)
    return {
        "n_questions": len(questions),
        "n_pairs": n_pairs,
        "n_steps": settings.epochs * -(-n_items // size),
        "batching": settings.batching,
        "batch_size": size,
        "optimizer": resolve_optimizer(settings.optimizer, model.device),
        "learning_rate": {
            "claim": rate or default_learning_rate(settings.batching, len(claim), whole),
            "whole": rate or default_learning_rate(settings.batching, whole, whole),
        },
    }
