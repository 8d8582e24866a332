"""Activations and probes of every head: ours, ITI's way with scikit-learn, and TransformerLens with scikit-learn.

All read every head at the last token of ``Q: {question} A: {answer}`` for every answer, fit one L2 logistic regression
a head on three quarters of the questions and rank heads on the others, on the same split. The peers run one text at a
time, as ITI's code and TransformerLens's examples do, and fit the heads in a loop. Generous to the peers:
TransformerLens caches nothing but the heads' outputs, and ITI's way does not collect residual streams as well.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import torch

from bench.harness import Options, Outcome, Prepared
from bench.work import load, questions
from locaudit.behaviours import Question
from locaudit.measure.activations import collect_activations
from locaudit.methods.probes import fit_probes
from locaudit.models import Model

VAL_FRACTION, SEED = 0.25, 0
"""Of the split by question; `fit_probes` defaults."""


def ours(options: Options) -> Prepared:
    """`collect_activations` on answer trees and `fit_probes`: Newton's method on all heads at once."""
    model, asked = load(options), questions(options)

    last: list = []

    def run(_: int) -> Outcome:
        activations = collect_activations(model, asked, context="answer")
        probes = fit_probes(activations, val_fraction=VAL_FRACTION, seed=SEED)
        values = activations.values.numpy()
        last[:] = [values, probes.weight.numpy(), probes.intercept.numpy()]
        return _outcome(values, probes.val_accuracy.flatten().tolist())

    return Prepared(run, model.lm, lambda: _logits(asked, *last))


def sklearn(options: Options) -> Prepared:
    """Forward hooks that keep every position of every layer, one text at a time."""
    import sklearn.linear_model  # noqa: F401  # imported before the clock starts

    model, asked = load(options), questions(options)
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(_module, args) -> None:
            kept[layer] = args[0].detach().squeeze(0).float().cpu()

        return hook

    for layer in range(model.n_layers):
        model.projection(("heads", layer)).register_forward_pre_hook(keep(layer))

    def read(text: str) -> np.ndarray:
        with torch.no_grad():
            model.lm(model.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device))
        every = torch.stack([kept[layer] for layer in range(model.n_layers)]).numpy()
        return every[:, -1].reshape(model.n_layers, model.n_heads, model.head_dim)

    return _prepared(asked, read, model)


def transformer_lens(options: Options) -> Prepared:
    """`run_with_cache` of TransformerLens's bridge around the same model, with the eager attention that it needs."""
    import sklearn.linear_model  # noqa: F401

    model, asked = load(options), questions(options)
    lens = _bridge(model, options.device)

    def read(text: str) -> np.ndarray:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"].to(options.device)
        with torch.no_grad():
            _, cache = lens.run_with_cache(ids, names_filter=lambda name: name.endswith("attn.hook_z"))
        last = [cache[f"blocks.{layer}.attn.hook_z"][0, -1] for layer in range(model.n_layers)]
        return torch.stack(last).float().cpu().numpy().reshape(model.n_layers, model.n_heads, model.head_dim)

    return _prepared(asked, read, model)


def _bridge(model: Model, device: str):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model.lm.set_attn_implementation("eager")
    with tempfile.TemporaryDirectory() as folder:  # it wants a tokenizer that lies in a folder
        model.tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers("in-memory", hf_model=model.lm, tokenizer=tokenizer, device=device)


def _prepared(asked: Sequence[Question], read: Callable[[str], np.ndarray], model: Model) -> Prepared:
    """A side that reads one text at a time and fits the heads in a loop."""
    last: list = []

    def run(_: int) -> Outcome:
        values = np.stack([read(f"Q: {q.text} A: {answer}") for q in asked for answer in q.answers])
        accuracies, weight, intercept = _fit(values, asked)
        last[:] = [values, weight, intercept]
        return _outcome(values, accuracies)

    return Prepared(run, model.lm, lambda: _logits(asked, *last))


def _fit(values: np.ndarray, asked: Sequence[Question]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """One `LogisticRegression` a head: held-out accuracies, weights, intercepts."""
    from sklearn.linear_model import LogisticRegression

    is_val = _held_out(asked)
    is_true = np.array([i < len(q.true) for q in asked for i in range(len(q.answers))])
    _, n_layers, n_heads, width = values.shape
    accuracies, weight, intercept = [], np.empty((n_layers, n_heads, width)), np.empty((n_layers, n_heads))
    for layer in range(n_layers):
        for head in range(n_heads):
            x = values[:, layer, head]
            probe = LogisticRegression(C=1, max_iter=1000).fit(x[~is_val], is_true[~is_val])
            accuracies.append(float(probe.score(x[is_val], is_true[is_val])))
            weight[layer, head], intercept[layer, head] = probe.coef_[0], probe.intercept_[0]
    return accuracies, weight, intercept


def _held_out(asked: Sequence[Question]) -> np.ndarray:
    """Which answers `fit_probes` holds out."""
    order = list(range(len(asked)))
    random.Random(SEED).shuffle(order)
    val = set(order[: round(VAL_FRACTION * len(asked))])
    return np.array([number in val for number, q in enumerate(asked) for _ in q.answers])


def _logits(
    asked: Sequence[Question], values: np.ndarray, weight: np.ndarray, intercept: np.ndarray
) -> dict[str, list[float]]:
    """What every head's probe says about every held-out answer.

    Logits and not accuracies are held against each other: where a probe is undecided, scikit-learn's tolerance on the
    gradient decides what its accuracy counts.
    """
    x = values[_held_out(asked)].astype(np.float64)
    return {"probe_logits": (np.einsum("nlhd,lhd->nlh", x, weight) + intercept).flatten().tolist()}


def _outcome(values: np.ndarray, accuracies: list[float]) -> Outcome:
    """Activations are a sample: first and last answer, first, middle and last layer."""
    n_layers = values.shape[1]
    sample = values[[0, -1]][:, [0, n_layers // 2, n_layers - 1]]
    return Outcome(len(values), {"activations": sample.flatten().tolist(), "probe_accuracy": accuracies})
