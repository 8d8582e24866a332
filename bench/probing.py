"""Speed of activations and probes of every head: locaudit, against hooks or TransformerLens with scikit-learn.

All sides read every head's output at the last token of ``Q: {question} A: {answer}``, for every answer. They fit one
L2-regularised logistic regression per head on three quarters of the questions and rank heads on the other quarter, with
the same split. The peers run one text at a time, as ITI's code and TransformerLens's examples do, and fit heads in a
loop. They get these advantages: TransformerLens caches only the heads' outputs, and the hooks, unlike ITI's code, do
not collect residual streams.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from bench.harness import Options, Outcome, Prepared, Task
from bench.work import Model, Question, Site, collect_activations, fit_probes

VAL_FRACTION, SEED = 0.25, 0
"""Held-out share and seed of the split by question: the defaults of `fit_probes`."""


Found = tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]
"""Activations (answers, layers, heads, width), probes' weights (layers, heads, width) and intercepts (layers, heads),
held-out accuracies."""


def ours(options: Options) -> Prepared:
    """`collect_activations` on answer trees and `fit_probes`, which runs Newton's method on all heads at once."""
    model, asked = options.load()

    def work() -> Found:
        values = collect_activations(model, asked, context="answer")
        probes = fit_probes(values, val_fraction=VAL_FRACTION, seed=SEED)
        accuracy = probes.val_accuracy.flatten().tolist()
        return values.values.numpy(), probes.weight.numpy(), probes.intercept.numpy(), accuracy

    return _prepared(model, asked, work)


def sklearn(options: Options) -> Prepared:
    """Forward hooks that keep all positions of all layers, one text at a time, and scikit-learn."""
    import sklearn.linear_model  # noqa: F401  # imported before the clock starts

    model, asked = options.load()
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        kept[layer] = args[0].detach().squeeze(0).float().cpu()

    for layer in range(model.n_layers):
        model.projection(Site("heads", layer)).register_forward_pre_hook(partial(keep, layer))

    def read(text: str) -> np.ndarray:
        with torch.no_grad():
            model.lm(model.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device))
        every = torch.stack([kept[layer] for layer in range(model.n_layers)]).numpy()
        return every[:, -1].reshape(model.n_layers, model.n_heads, model.head_dim)

    return _prepared(model, asked, lambda: _one_by_one(asked, read))


def transformer_lens(options: Options) -> Prepared:
    """`run_with_cache` of TransformerLens's bridge to the same model, with the eager attention that it requires."""
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
    with tempfile.TemporaryDirectory() as folder:  # it requires a tokenizer saved in a folder
        model.tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers("in-memory", hf_model=model.lm, tokenizer=tokenizer, device=device)


def _one_by_one(asked: Sequence[Question], read: Callable[[str], np.ndarray]) -> Found:
    """Read one text at a time and fit one `LogisticRegression` per head."""
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
    """Make a side that does `work`, and the values by which sides are compared.

    Activations are compared on a sample: first and last answer; first, middle and last layer. Probes are compared by
    the logit of every head at every held-out answer. Accuracies are only reported: if a logit is near 0, the tolerance
    of scikit-learn's solver decides on which side it falls.
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
    """Which answers `fit_probes` holds out: (answers,) booleans."""
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
