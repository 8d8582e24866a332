"""The means of `bench.means`: what each is, and how it is switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

import locaudit.measure.forward as forward
import locaudit.methods.training as loop
from bench.harness import Options
from bench.tried import Mean, attention, beforehand, compiled, edit, generate, off
from bench.work import load, questions
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.linears import Fast
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, Tree, _lay_out, plant
from locaudit.methods.probes import fit_logistic
from locaudit.methods.training import Fit, Job, TrainingData, train
from locaudit.models import Model


def means(options: Options) -> list[Mean]:
    """All of them, on one model and the same questions."""
    model, part = load(options), questions(options)
    pairs = [(q.text, q.answers) for q in part]
    forest = plant(model.tokenizer, Prompt(), pairs)
    primed = plant(model.tokenizer, Prompt(primer=load_primer("default")), pairs)
    reference = tuple(x[0] for x in answer_log_probs(model, forest))
    data = TrainingData(forest, tuple(len(q.true) for q in part), reference)
    return [
        *_scoring(model, forest, primed),
        *_training(model, data),
        *attention(model, data, primed),
        *beforehand(model, data),
        *_others(model, primed, options),
        *_sixteen_bits(model, data, primed, options),
        *compiled(model, primed),
        *(_products(model, data, primed) if (options.dtype, options.device) == ("float32", "cpu") else []),
    ]


def _scoring(model: Model, forest: Forest, primed: Forest) -> list[Mean]:
    alone, inlined = _one_answer_a_tree(forest), _inlined(primed)
    lengths = [len(tree) for tree in primed.trees]
    limit = forward.default_row_tokens(model)
    single = sum(len(rows) * max(lengths[i] for i in rows) for rows in forward.batches(lengths, limit))
    packed = sum(
        len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in forward.packed_rows(lengths, limit)
    )
    n_unshared = sum(len(_unshared(tree).tokens) for tree in forest.trees)
    n_prefix = len(primed.prefix)
    score, score_primed = (lambda: answer_log_probs(model, forest)), (lambda: answer_log_probs(model, primed))
    return [
        Mean("answer tree", "scoring", alone.n_tokens / forest.n_tokens, score,
             lambda: answer_log_probs(model, alone)),
        Mean("answers share their beginnings, last tokens do not run", "scoring", n_unshared / forest.n_tokens, score,
             off(Tree, "scored", property(_unshared), score)),
        Mean("several trees a row", "scoring with primer", (single + n_prefix) / (packed + n_prefix), score_primed,
             off(forward, "ROW_LENGTH", 1, score_primed)),
        Mean("prefix keys and values", "scoring with primer", inlined.n_tokens / (primed.n_tokens + n_prefix),
             score_primed, lambda: answer_log_probs(model, inlined)),
    ]  # fmt: skip


def _training(model: Model, data: TrainingData) -> list[Mean]:
    half, whole = model.n_layers // 2, model.whole()
    residuals, nothing = Residuals(model, data.forest), Residuals(model, data.forest, budget_bytes=0)

    def fit(n: int = 1, where: Location = whole, residuals: Residuals = nothing, tokens: int | None = None) -> Any:
        jobs = [Job(where, 0.2, seed) for seed in range(n)]
        return train(model, data, jobs, epochs=1, residuals=residuals, step_tokens=tokens)

    def middle(kept: Residuals) -> Callable[[], Any]:
        return lambda: fit(where=Location(((half, 0),)), residuals=kept)

    # Passes through a layer's weights, and through the head's for the tokens that predict something.
    layer = sum(p.numel() for p in model.layer(0).parameters())
    share = sum(len({edge[0] for edge in tree.scored.edges}) for tree in data.forest.trees) / data.forest.n_tokens
    head = 2 * share * model.lm.get_output_embeddings().weight.numel()  # type: ignore[union-attr]
    passes = (model.n_layers + (model.n_layers - half)) * layer + head
    return [
        Mean("log-probabilities in blocks", "training, all heads", None, fit,
             off(forward, "head_log_probs", _plain_head, fit)),
        Mean("forwards from the lowest edited layer", "training, one head in the middle layer",
             passes / (2 * (model.n_layers - half) * layer + head), middle(residuals), middle(nothing)),
        Mean("one row an edit instead of one a question", "training, all heads", None, fit,
             off(loop, "collate_bank", _one_tree_a_row, fit)),
        Mean("4 edits in one bank", "training 4 edits, all heads", None, lambda: fit(4),
             lambda: [fit() for _ in range(4)]),
        Mean("steps in parts, attention and some MLPs of long questions run again", "training, all heads", None, fit,
             lambda: fit(tokens=10**9)),
        # A step passes frozen weights twice, forward and back; the reference passes them once.
        Mean("log-probabilities of the unedited model kept", "training, all heads", 1.5, fit,
             lambda: (answer_log_probs(model, data.forest), fit())),
    ]  # fmt: skip


def _products(model: Model, data: TrainingData, primed: Forest) -> list[Mean]:
    name, residuals, one = "products by oneDNN instead of MKL", Residuals(model, data.forest), edit(model, 0)

    def fit(where: Location) -> Callable[[], Any]:
        return lambda: train(model, data, [Job(where, 0.2, 0)], epochs=1, residuals=residuals)

    tasks = {
        "training, all heads": fit(model.whole()),
        "training, one head in the middle layer": fit(Location(((model.n_layers // 2, 0),))),
        "scoring with primer": lambda: answer_log_probs(model, primed),
        "generating": lambda: generate(model, primed, [one]),
    }
    return [Mean(name, task, None, run, _by_mkl(run)) for task, run in tasks.items()]


def _by_mkl(run: Callable[[], Any]) -> Callable[[], Any]:
    def go() -> Any:
        before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return run()
        finally:
            torch.backends.mkldnn.enabled = before

    return go


def _others(model: Model, primed: Forest, options: Options) -> list[Mean]:
    edits, together, alone = [edit(model, seed) for seed in range(4)], *_probing(model, options)
    return [
        Mean("4 edits in one bank", "generating, 4 edits", None, lambda: generate(model, primed, edits),
             lambda: [generate(model, primed, [one]) for one in edits]),
        Mean("batched probes", "fitting all heads' probes", None, together, alone),
    ]  # fmt: skip


def _sixteen_bits(model: Model, data: TrainingData, primed: Forest, options: Options) -> list[Mean]:
    """Weights and activations in bfloat16 against float32; edits, losses and log-probabilities are float32 in both."""
    if options.dtype != "float32":
        return []
    half = load(replace(options, dtype="bfloat16"))

    def fit(model: Model) -> Callable[[], Any]:
        nothing = Residuals(model, data.forest, budget_bytes=0)
        job = Job(model.whole(), 0.2, 0)
        return lambda: _sound(train(model, data, [job], epochs=1, residuals=nothing))

    scores = lambda: answer_log_probs(half, primed)  # noqa: E731
    answers = lambda n: generate(half, primed, [edit(half, k) for k in range(n)])  # noqa: E731
    return [
        Mean("bfloat16", "training, all heads", None, fit(half), fit(model)),
        Mean("bfloat16", "scoring with primer", None, scores, lambda: answer_log_probs(model, primed)),
        Mean("rows of few lengths, in bfloat16", "training, all heads", None, fit(half),
             off(forward, "BUCKET", 1, fit(half))),
        Mean("rows of few lengths, in bfloat16", "scoring with primer", None, scores,
             off(forward, "BUCKET", 1, scores)),
        Mean("bfloat16", "generating", None, lambda: answers(1), lambda: generate(model, primed, [edit(model, 0)])),
        Mean("one product for the last columns of prompts, in bfloat16", "generating, 4 edits", None,
             lambda: answers(4), off(Fast, "__call__", _own_forward, lambda: answers(4))),
    ]  # fmt: skip


def _own_forward(part: Fast, *args: Any, **kwargs: Any) -> Any:
    return part.forward(*args, **kwargs)


def _sound(fits: Sequence[Fit]) -> None:
    assert all(fit.edit is not None for fit in fits)


def _one_answer_a_tree(forest: Forest) -> Forest:
    trees = tuple(Tree(tree.prompt, (branch,)) for tree in forest.trees for branch in tree.branches)
    return Forest(forest.prefix, trees)


def _inlined(forest: Forest) -> Forest:
    return Forest((), tuple(Tree(forest.prefix + tree.prompt, tree.branches) for tree in forest.trees))


@cache
def _unshared(tree: Tree):
    """Every answer's tokens for themselves, the last ones too."""
    layout = _lay_out(Tree(tree.prompt, ((0,),)), ends=False)
    tokens, positions, parents = list(tree.prompt), list(layout.positions), list(layout.parents)
    edges, paths, last = [], [], []
    for branch in tree.branches:
        column, path = len(tree.prompt) - 1, []
        for token in branch:
            path.append(len(edges))
            edges.append((column, token))
            tokens.append(token)
            positions.append(positions[column] + 1)
            parents.append(column)
            column = len(tokens) - 1
        paths.append(tuple(path))
        last.append(column)
    return type(layout)(*map(tuple, (tokens, positions, parents, edges, paths, last)))


def _one_tree_a_row(rows, n_edits, n_prefix, model):
    return forward.collate_bank([[tree] for row in rows for tree in row], n_edits, n_prefix, model)


def _plain_head(hidden, head, which, token):
    logits = torch.nn.functional.linear(hidden, head.weight).float()
    return logits[which, token] - logits.logsumexp(dim=1)[which]


def _probing(model: Model, options: Options) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """All probes together and one by one, on random features of the real shape: only the time counts here."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(model.n_layers * model.n_heads, 40 * options.n_questions, model.head_dim, generator=generator)
    y = torch.rand(x.shape[1], generator=generator) > 0.5
    return lambda: fit_logistic(x, y), lambda: [fit_logistic(one.unsqueeze(0), y) for one in x]
