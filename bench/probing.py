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

from bench.harness import Options, Outcome, Prepared, Task
from bench.work import Model, Question, Site, collect_activations, fit_probes

VAL_FRACTION, SEED = 0.25, 0
"""Of the split by question; `fit_probes` defaults."""


Found = tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]
"""Activations (answers, layers, heads, width), probes' weights and intercepts, held-out accuracies."""


def ours(options: Options) -> Prepared:
    """`collect_activations` on answer trees and `fit_probes`: Newton's method on all heads at once."""
    model, asked = options.load()

    def work() -> Found:
        values = collect_activations(model, asked, context="answer")
        probes = fit_probes(values, val_fraction=VAL_FRACTION, seed=SEED)
        accuracy = probes.val_accuracy.flatten().tolist()
        return values.values.numpy(), probes.weight.numpy(), probes.intercept.numpy(), accuracy

    return _prepared(model, asked, work)


def sklearn(options: Options) -> Prepared:
    """Forward hooks that keep every position of every layer, one text at a time."""
    import sklearn.linear_model  # noqa: F401  # imported before the clock starts

    model, asked = options.load()
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int, activations: torch.Tensor) -> None:
        kept[layer] = activations.detach().squeeze(0).float().cpu()

    for layer in range(model.n_layers):
        projection = model.projection(Site("heads", layer))
        projection.register_forward_pre_hook(lambda _module, args, layer=layer: keep(layer, args[0]))

    def read(text: str) -> np.ndarray:
        with torch.no_grad():
            model.lm(model.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device))
        every = torch.stack([kept[layer] for layer in range(model.n_layers)]).numpy()
        return every[:, -1].reshape(model.n_layers, model.n_heads, model.head_dim)

    return _prepared(model, asked, lambda: _one_by_one(asked, read))


def transformer_lens(options: Options) -> Prepared:
    """`run_with_cache` of TransformerLens's bridge around the same model, with the eager attention that it needs."""
    import sklearn.linear_model  # noqa: F401

    model, asked = options.load()
    lens = _bridge(model, options.subject.device)

    def read(text: str) -> np.ndarray:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"].to(options.subject.device)
        with torch.no_grad():
            _, cache = lens.run_with_cache(ids, names_filter=lambda name: name.endswith("attn.hook_z"))
        last = [cache[f"blocks.{layer}.attn.hook_z"][0, -1] for layer in range(model.n_layers)]
        return torch.stack(last).float().cpu().numpy().reshape(model.n_layers, model.n_heads, model.head_dim)

    return _prepared(model, asked, lambda: _one_by_one(asked, read))


def _bridge(model: Model, device: str):
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model.lm.set_attn_implementation("eager")
    with tempfile.TemporaryDirectory() as folder:  # it wants a tokenizer that lies in a folder
        model.tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers("in-memory", hf_model=model.lm, tokenizer=tokenizer, device=device)


def _one_by_one(asked: Sequence[Question], read: Callable[[str], np.ndarray]) -> Found:
    """Read one text at a time, fit one `LogisticRegression` a head."""
    from sklearn.linear_model import LogisticRegression

    values = np.stack([read(f"Q: {q.text} A: {answer}") for q in asked for answer in q.answers])
    is_val = _held_out(asked)
    is_true = np.array([i < len(q.true) for q in asked for i in range(len(q.answers))])
    _, n_layers, n_heads, width = values.shape
    weight, intercept, accuracy = np.empty((n_layers, n_heads, width)), np.empty((n_layers, n_heads)), []
    for at in np.ndindex(n_layers, n_heads):
        x = values[:, *at]  # (answers, width)
        probe = LogisticRegression(C=1, max_iter=1000).fit(x[~is_val], is_true[~is_val])
        accuracy.append(float(probe.score(x[is_val], is_true[is_val])))
        weight[at], intercept[at] = probe.coef_[0], probe.intercept_[0]
    return values, weight, intercept, accuracy


def _prepared(model: Model, asked: Sequence[Question], work: Callable[[], Found]) -> Prepared:
    """A side that does `work`.

    Of the activations a sample is compared: first and last answer, first, middle and last layer. Of the probes, what
    every head's says about every held-out answer. Logits and not accuracies are held against each other: where a
    probe is undecided, scikit-learn's tolerance on the gradient decides what its accuracy counts.
    """
    last: list[np.ndarray] = []

    def run(_: int) -> Outcome:
        *last[:], accuracy = work()
        values, n_layers = last[0], model.n_layers
        sample = values[[0, -1]][:, [0, n_layers // 2, n_layers - 1]]
        return Outcome(len(values), {"activations": sample.flatten().tolist(), "probe_accuracy": accuracy})

    def check() -> dict[str, list[float]]:
        values, weight, intercept = last
        x = values[_held_out(asked)].astype(np.float64)
        return {"probe_logits": (np.einsum("nlhd,lhd->nlh", x, weight) + intercept).flatten().tolist()}

    return Prepared(run, model.lm, check)


def _held_out(asked: Sequence[Question]) -> np.ndarray:
    """Which answers `fit_probes` holds out."""
    order = list(range(len(asked)))
    random.Random(SEED).shuffle(order)
    val = set(order[: round(VAL_FRACTION * len(asked))])
    return np.array([number in val for number, q in enumerate(asked) for _ in q.answers])


TASK = Task(
    "probing",
    "answers",
    {"ours": ours, "sklearn": sklearn, "transformer_lens": transformer_lens},
    tolerances={"activations": 1e-3, "probe_logits": 0.1},
    bars={("cpu", "all"): 6, ("cuda", "all"): 30},
    questions=32,
    smoke=4,
)
