"""What all trials of an audit share, computed once and kept in the run folder's cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from locaudit.behaviours import Question, Split
from locaudit.behaviours.format import Prompt
from locaudit.config import AuditConfig
from locaudit.errors import ModelError
from locaudit.location import Kind, Location
from locaudit.measure.activations import Activations, collect_activations
from locaudit.measure.drift import DriftText, cut_documents, sample_documents
from locaudit.measure.forward import answer_log_probs, check_length
from locaudit.measure.tree import Forest, plant
from locaudit.methods.iti import iti_theta
from locaudit.methods.probes import Probes, fit_probes
from locaudit.methods.training import TrainingData
from locaudit.models import Model
from locaudit.run.worker import HeldOut, Shared
from locaudit.store import Store, write_atomically
from locaudit.store.cache import Cache

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What training questions say of every unit of one kind."""

    probes: Probes
    theta: Float[Tensor, "layers units width"]
    """sigma u."""
    norm: Float[Tensor, "layers units"]
    """Mean Euclidean norm of a unit's activation."""


def prepare_probes(
    store: Store, model: Model, train: Sequence[Question], claim: Location | None, context: str, say: Say
) -> Prepared:
    """Probes, ITI directions and norms of every unit of the claim's kind, from training questions only."""
    config = store.config
    kind: Kind = claim.kind if claim else "heads"

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        say("reading activations of the training questions")
        probe = config.probe
        activations = collect_activations(model, train, context=probe.context, kind=kind, seed=config.seed)
        spread: Activations | None = None
        if probe.context == "answer":
            spread = collect_activations(model, train, context="next_question", kind=kind, seed=config.seed)
        say(f"fitting {model.n_layers * model.n_units(kind)} probes")
        probes = fit_probes(
            activations, inverse_l2=probe.inverse_l2, val_fraction=probe.val_fraction, seed=config.seed, kind=kind
        )
        theta = iti_theta(activations, spread, direction=config.iti.direction, probes=probes, seed=config.seed)
        tensors = {
            "weight": probes.weight,
            "intercept": probes.intercept,
            "val_accuracy": probes.val_accuracy,
            "theta": theta,
            "norm": activations.values.norm(dim=-1).mean(dim=0),
        }
        return tensors, {"majority": probes.majority, "n_train": probes.n_train, "n_val": probes.n_val}

    tensors, meta = _cached(store, "probes", f"{context}-{kind}-norm", compute)
    probes = Probes(tensors["weight"], tensors["intercept"], tensors["val_accuracy"], **meta, kind=kind)
    return Prepared(probes, tensors["theta"], tensors["norm"])


def prepare_shared(
    store: Store, model: Model, split: Split, primer: str, theta: Tensor | None, cache: Cache, context: str, say: Say
) -> Shared:
    """Trees, the unedited model's log-probabilities on them, and the drift text."""
    config = store.config
    style = config.prompt.style
    scoring = Prompt(style, primer)
    training = Prompt(style, primer if config.prompt.primer_in_training else "")

    def reference(name: str, questions: tuple[Question, ...], prompt: Prompt) -> tuple[Forest, tuple[Tensor, ...]]:
        forest = plant(model.tokenizer, prompt, [(question.text, question.answers) for question in questions])
        if name != "train" and config.evaluation.max_new_tokens:
            longest = len(forest.prefix) + max(len(tree.prompt) for tree in forest.trees)
            check_length(model, longest + config.evaluation.max_new_tokens, f"a {name} question with its answer")

        def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
            say(f"scoring the unedited model on {len(questions)} {name} questions")
            sums = torch.cat([sums[0] for sums in answer_log_probs(model, forest)])
            if not sums.isfinite().all():
                raise ModelError(
                    got=f"{model.name}, whose log-probabilities on {name} questions are not finite",
                    expected="finite numbers from the unedited model",
                    remedy="check the weights, or load it in float32 (loading.dtype)",
                )
            return {"sums": sums}, {}

        tensors, _ = _cached(store, f"reference-{name}", context, compute)
        return forest, tensors["sums"].split([len(tree.branches) for tree in forest.trees])

    train = split.train[: config.optimal.max_questions]
    train_forest, train_reference = reference("train", train, training)
    splits = {
        name: HeldOut(questions, *reference(name, questions, scoring))
        for name, questions in (("val", split.val), ("test", split.test))
    }
    n_true = tuple(len(question.true) for question in train)
    drift = _cached(store, "drift", context, lambda: ({"documents": _documents(config, model, say)}, {}))[0]
    return Shared(
        model,
        config,
        TrainingData(train_forest, n_true, train_reference),
        splits,
        DriftText(drift["documents"]),
        theta,
        cache,
    )


def borrow_cache(store: Store, folder: Path) -> None:
    """Copy what another run prepared and this one lacks; it is used only under the same key."""
    for file in (folder / "cache").glob("*.safetensors"):
        if not (store.cache / file.name).exists():
            write_atomically(store.cache / file.name, file.read_bytes())


def _documents(config: AuditConfig, model: Model, say: Say) -> Tensor:
    settings = config.evaluation
    size = settings.drift_documents, settings.drift_tokens
    check_length(model, settings.drift_tokens + 1, "a drift document")
    if settings.drift_text is not None:
        return cut_documents(model, settings.drift_text, *size)
    say(f"sampling {size[0]} x {size[1]} tokens of text from the unedited model")
    return sample_documents(model, *size, seed=config.seed)


def _cached(
    store: Store, name: str, key: str, compute: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON values from ``cache/{name}.safetensors`` if it was written under the same key, else computed."""
    path = store.cache / f"{name}.safetensors"
    if path.is_file():
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("locaudit", "{}"))
                if header.get("key") == key:
                    return {k: file.get_tensor(k) for k in file.keys()}, header["meta"]  # noqa: SIM118
        except (SafetensorError, ValueError):
            pass  # damaged: computed anew
    tensors, meta = compute()
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = json.dumps({"key": key, "meta": meta}, sort_keys=True)
    write_atomically(path, save(tensors, {"locaudit": header}))
    return tensors, meta
