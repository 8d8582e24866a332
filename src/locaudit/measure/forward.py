"""Log-probabilities of answers, from trees, under K edits at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from locaudit.edits import EditBank
from locaudit.edits.hooks import resumed
from locaudit.errors import ModelError
from locaudit.measure.head import head_log_probs
from locaudit.measure.tree import Forest, Tree, TreeBatch, additive_mask, collate, pack
from locaudit.models import CACHE, Model
from locaudit.models.memory import of_device

Prefix = list[tuple[Tensor, Tensor]]
"""Keys and values (K, heads, prefix tokens, head_dim) of each layer, for each of K edits."""


@dataclass(frozen=True)
class Start:
    """A forward that begins at a decoder layer, with the residual stream that enters it."""

    layer: int
    hidden: Float[Tensor, "rows tokens d"]
    prefix: Float[Tensor, "prefix d"] | None = None
    """Of the prefix, for `run_prefix`."""


class Starts(Protocol):
    """Where forwards of a forest may begin: `locaudit.measure.residual.Residuals`."""

    def start(self, layer: int, rows: Sequence[Sequence[int]], n_columns: int, n_edits: int = 1) -> Start | None:
        """Of rows of trees (by number), all repeated for each edit; None: at the first layer."""


ROW_TOKENS = {"cpu": 640, "cuda": 16384}
"""Padded tokens of one forward when scoring, over all rows and edits, by device."""

ROW_LENGTH = 256
"""Tokens up to which trees share a row: fewer rows pad less and repeat the prefix less, longer ones attend more."""

BUCKET = 32
"""Rows of 16-bit models are padded to a multiple of this: kernels are made for each new shape."""


def answer_log_probs(
    model: Model,
    forest: Forest,
    bank: EditBank | None = None,
    *,
    prefix: Prefix | None = None,
    residuals: Starts | None = None,
    row_tokens: int | None = None,
) -> list[Float[Tensor, "k answers"]]:
    """Summed log-probability (nats, float32) of every branch of every tree, under each edit of the bank.

    The forest's prefix runs once for each edit; `prefix` is `run_prefix` of it under the same bank, if at hand.
    With the forest's `residuals` at hand, forwards begin at the lowest edited layer. A forward takes `row_tokens`
    padded tokens (None: `ROW_TOKENS`); batching, order and padding do not change the result beyond rounding.
    """
    check_depth(model, forest)
    n_edits, lowest = (bank.n_edits, bank.lowest_layer) if bank else (1, 0)
    out: list[Tensor | None] = [None] * len(forest.trees)
    with torch.no_grad():
        for rows, batch in forest_batches(model, forest, n_edits, row_tokens=row_tokens):
            start = residuals.start(lowest, rows, batch.input_ids.shape[1], n_edits) if residuals else None
            if prefix is None:
                prefix = run_prefix(model, forest.prefix, bank, start)
            edit_of = torch.arange(n_edits).repeat_interleave(len(rows))
            sums = branch_sums(batch, token_log_probs(model, batch, bank, edit_of, prefix, start))
            numbers = [i for row in rows for i in row]
            pieces = sums.view(n_edits, -1).split([len(forest.trees[i].branches) for i in numbers], dim=1)
            for i, piece in zip(numbers, pieces, strict=True):
                out[i] = piece.cpu()
    return out  # type: ignore[return-value]


def batches(lengths: Sequence[int], row_tokens: int, n_rows: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most `row_tokens` padded tokens (or a single row).

    `n_rows`: at most so many in a batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    current: list[int] = []
    for i in order:
        if current and (lengths[i] * (len(current) + 1) > row_tokens or len(current) == n_rows):
            yield current
            current = []
        current.append(i)
    if current:
        yield current


def forest_batches(
    model: Model, forest: Forest, n_edits: int = 1, *, row_tokens: int | None = None, ends: bool = False
) -> Iterator[tuple[list[list[int]], TreeBatch]]:
    """(rows of tree numbers, their batch) for each forward, of at most `row_tokens` padded tokens (or one row).

    Trees share rows of up to `ROW_LENGTH` tokens, and rows of similar length a forward; None: `ROW_TOKENS`. The rest as
    in `collate_bank`.
    """
    limit = max((row_tokens or of_device(ROW_TOKENS, model.device)) // n_edits, 1)
    lengths = [len((tree.read if ends else tree.scored).tokens) for tree in forest.trees]
    packed = pack(lengths, min(ROW_LENGTH, limit))
    for numbers in batches([sum(lengths[i] for i in row) for row in packed], limit):
        rows = [packed[n] for n in numbers]
        trees = [[forest.trees[i] for i in row] for row in rows]
        yield rows, collate_bank(trees, n_edits, len(forest.prefix), model, ends=ends)


def collate_bank(
    rows: Sequence[Sequence[Tree]], n_edits: int, n_prefix: int, model: Model, *, ends: bool = False
) -> TreeBatch:
    """The rows, once for each edit (edit-major), on the model's device."""
    multiple = BUCKET if model.lm.dtype != torch.float32 else 1
    batch = collate(list(rows) * n_edits, n_prefix=n_prefix, pad_id=model.pad_id, ends=ends, multiple=multiple)
    return replace(batch, **{f.name: getattr(batch, f.name).to(model.device) for f in fields(batch)})


def run_prefix(model: Model, prefix: Sequence[int], bank: EditBank | None, start: Start | None = None) -> Prefix | None:
    """Keys and values of the prefix under each edit; gradients flow where they are enabled.

    Below the layer of `start` they are empty of content: nothing reads them there.
    """
    if not prefix:
        return None
    n_edits = bank.n_edits if bank else 1
    ids = torch.tensor(prefix, device=model.device).expand(n_edits, -1)
    rows = torch.arange(n_edits, device=model.device)
    cache = DynamicCache()
    first = 0
    with ExitStack() as stack:
        if start is not None and start.prefix is not None:
            first = start.layer
            stack.enter_context(resumed(model, first, start.prefix.expand(n_edits, -1, -1)))
        if bank:
            stack.enter_context(bank.applied(model, rows, torch.zeros_like(ids, dtype=torch.bool)))
        model.lm.base_model(
            input_ids=ids,
            position_ids=torch.arange(len(prefix), device=model.device).expand(n_edits, -1),
            use_cache=True,
            **{CACHE: cache},
        )
    kept = [(layer.keys, layer.values) for layer in cache.layers[first:]]  # type: ignore[union-attr]
    blank = ids.new_zeros(1, dtype=model.lm.dtype).expand(n_edits, 1, len(prefix), 1)
    return [(blank, blank)] * first + kept  # type: ignore[return-value]


def cache_of(prefix: Prefix, rows: Int[Tensor, " rows"]) -> DynamicCache:
    """The prefix's keys and values for a batch whose row r is under edit ``rows[r]``."""
    cache = DynamicCache()
    for layer, pair in enumerate(prefix):
        keys, values = (part.index_select(0, rows.to(part.device)) for part in pair)
        cache.update(keys, values, layer)
    return cache


def token_log_probs(
    model: Model,
    batch: TreeBatch,
    bank: EditBank | None,
    rows: Int[Tensor, " rows"],
    prefix: Prefix | None = None,
    start: Start | None = None,
) -> Float[Tensor, " n"]:
    """Log-probability (nats, float32) of each target token of the batch, row r under edit ``rows[r]``.

    Logits exist only for columns that some target is predicted from, and only a block of the vocabulary at a time.
    """
    row, predictor, token = batch.target
    # A column that several tokens are predicted from is taken once, and rows by index_select: indexing adds up the
    # gradients of repeats in no fixed order on a CPU with several threads, and training would not repeat to the bit.
    where, which = torch.unique(row * batch.input_ids.shape[1] + predictor, return_inverse=True)
    states = run_trees(model, batch, bank, rows, prefix, start).flatten(0, 1)
    chosen = states.index_select(0, where.to(states.device))
    if model.head is not None:
        device = model.head.weight.device
        return head_log_probs(chosen.to(device), model.head, which.to(device), token.to(device))
    which, token = which.to(chosen.device), token.to(chosen.device)
    chosen = chosen.float()
    return chosen[which, token] - chosen.logsumexp(dim=1)[which]


def run_trees(
    model: Model,
    batch: TreeBatch,
    bank: EditBank | None = None,
    rows: Int[Tensor, " rows"] | None = None,
    prefix: Prefix | None = None,
    start: Start | None = None,
) -> Float[Tensor, "rows tokens d"]:
    """Last hidden states of the batch, row r under edit ``rows[r]`` (None: the only one).

    Logits where the model has no plain head.
    """
    rows = batch.input_ids.new_zeros(len(batch.input_ids)) if rows is None else rows.to(model.device)
    n_prefix = prefix[0][0].shape[2] if prefix else 0
    keywords = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": additive_mask(batch, n_prefix, model.lm.dtype),
        CACHE: cache_of(prefix, rows) if prefix else None,
        "use_cache": bool(prefix),
    }
    with ExitStack() as stack:
        if start is not None:
            stack.enter_context(resumed(model, start.layer, start.hidden))
        if bank:
            stack.enter_context(bank.applied(model, rows, batch.answer_positions))
        if model.head is not None:
            return model.lm.base_model(**keywords).last_hidden_state
        return model.lm(**keywords).logits


def branch_sums(batch: TreeBatch, values: Float[Tensor, " n"]) -> Float[Tensor, " branches"]:
    """Sum of the targets' values over each branch."""
    branch, step = batch.path.to(values.device)
    return values.new_zeros(batch.n_branches).index_add(0, branch, values.index_select(0, step))


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
