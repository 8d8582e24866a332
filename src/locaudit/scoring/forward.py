"""Log-probabilities of answers, from trees, under K edits at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from locaudit.edits import EditBank
from locaudit.errors import ModelError
from locaudit.models import Model
from locaudit.scoring.tree import Forest, Tree, TreeBatch, additive_mask, collate

Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values (K, heads, prefix tokens, head_dim) of each layer, for each of K edits."""

ROW_TOKENS = 640
"""Padded tokens of one forward when scoring, over all rows; bounds the memory of the logits."""


def answer_log_probs(
    model: Model,
    forest: Forest,
    bank: EditBank | None = None,
    *,
    prefix: Prefix | None = None,
    row_tokens: int = ROW_TOKENS,
) -> list[Float[Tensor, "k answers"]]:
    """Summed log-probability (nats, float32) of every branch of every tree, under each edit of the bank.

    The forest's prefix runs once for each edit; `prefix` is `run_prefix` of it under the same bank, if at hand.
    Batching, order and padding do not change the result beyond rounding.
    """
    check_depth(model, forest)
    n_edits = bank.n_edits if bank else 1
    out: list[Tensor | None] = [None] * len(forest.trees)
    with torch.no_grad():
        prefix = run_prefix(model, forest.prefix, bank) if prefix is None else prefix
        for numbers in batches([len(tree) for tree in forest.trees], max(row_tokens // n_edits, 1)):
            trees = [forest.trees[i] for i in numbers]
            batch = collate_bank(trees, n_edits, len(forest.prefix), model)
            sums = branch_sums(batch, token_log_probs(model, batch, bank, _edit_rows(n_edits, len(trees)), prefix))
            pieces = sums.view(n_edits, -1).split([len(tree.branches) for tree in trees], dim=1)
            for i, piece in zip(numbers, pieces, strict=True):
                out[i] = piece.cpu()
    return out  # type: ignore[return-value]


def batches(lengths: Sequence[int], row_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most `row_tokens` padded tokens (or a single row)."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    current: list[int] = []
    for i in order:
        if current and lengths[i] * (len(current) + 1) > row_tokens:
            yield current
            current = []
        current.append(i)
    if current:
        yield current


def collate_bank(trees: Sequence[Tree], n_edits: int, n_prefix: int, model: Model) -> TreeBatch:
    """The trees, once for each edit (edit-major rows), on the model's device."""
    batch = collate(list(trees) * n_edits, n_prefix=n_prefix, pad_id=model.pad_id)
    return replace(batch, **{f.name: getattr(batch, f.name).to(model.device) for f in fields(batch)})


def _edit_rows(n_edits: int, n_trees: int) -> Int[Tensor, " rows"]:
    return torch.arange(n_edits).repeat_interleave(n_trees)


def run_prefix(model: Model, prefix: Sequence[int], bank: EditBank | None) -> Prefix | None:
    """Keys and values of the prefix under each edit; gradients flow where they are enabled."""
    if not prefix:
        return None
    n_edits = bank.n_edits if bank else 1
    ids = torch.tensor(prefix, device=model.device).expand(n_edits, -1)
    rows = torch.arange(n_edits, device=model.device)
    cache = DynamicCache()
    with bank.applied(model, rows, torch.zeros_like(ids, dtype=torch.bool)) if bank else nullcontext():
        model.lm(
            input_ids=ids,
            position_ids=torch.arange(len(prefix), device=model.device).expand(n_edits, -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc]


def token_log_probs(
    model: Model,
    batch: TreeBatch,
    bank: EditBank | None,
    rows: Int[Tensor, " rows"],
    prefix: Prefix | None = None,
) -> Float[Tensor, " n"]:
    """Log-probability (nats, float32) of each target token of the batch, row r under edit ``rows[r]``.

    Logits are computed only at columns that some target is predicted from.
    """
    rows = rows.to(model.device)
    cache, n_prefix = None, 0
    if prefix is not None:
        n_prefix = prefix[0][0].shape[2]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prefix):
            cache.update(
                keys.index_select(0, rows.to(keys.device)), values.index_select(0, rows.to(values.device)), layer
            )
    row, predictor, token = batch.target
    columns, column = torch.unique(predictor, return_inverse=True)
    with bank.applied(model, rows, batch.answer_positions) if bank else nullcontext():
        logits = model.lm(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=additive_mask(batch, n_prefix, model.lm.dtype),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=columns,
        ).logits
    # A column that several branches are predicted from is taken once, and rows by index_select: indexing adds up the
    # gradients of repeats in no fixed order on a CPU with several threads, and training would not repeat to the bit.
    where, which = torch.unique(row * len(columns) + column, return_inverse=True)
    chosen = logits.flatten(0, 1).index_select(0, where.to(logits.device)).float()
    which, token = which.to(logits.device), token.to(logits.device)
    return chosen[which, token] - chosen.logsumexp(dim=1)[which]


def branch_sums(batch: TreeBatch, values: Float[Tensor, " n"]) -> Float[Tensor, " branches"]:
    """Sum of the target tokens' values over each branch."""
    zeros = values.new_zeros(batch.n_branches)
    return zeros.index_add(0, batch.target_branch.to(values.device), values)


def check_depth(model: Model, forest: Forest) -> None:
    """Raise `ModelError` when a path is longer than the model's context or its sliding window."""
    check_length(model, forest.depth, "a question with an answer (prompt included)")


def check_length(model: Model, n_tokens: int, what: str) -> None:
    """Raise `ModelError` when `n_tokens` are more than the model's context or its sliding window."""
    limits = {
        "context": getattr(model.config, "max_position_embeddings", None),
        "sliding window": getattr(model.config, "sliding_window", None),
    }
    for name, limit in limits.items():
        if limit is not None and n_tokens > limit:
            raise ModelError(
                got=f"{what} of {n_tokens} tokens and a {name} of {limit}",
                expected=f"at most {limit} tokens",
                remedy="drop long questions, shorten prompt.primer, evaluation.max_new_tokens or "
                "evaluation.drift_tokens, or take another model",
            )
