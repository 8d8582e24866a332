"""Log-probabilities of answers, computed from answer trees under K edits at once.

From a forest of trees to one number per answer:

1. `pack` puts several trees into a row of up to `ROW_LENGTH` tokens, and `batches` puts rows of similar length into one
   forward. Three trees of 100, 150 and 90 columns become the rows [150, 100] and [90].
2. `collate_bank` repeats the rows for each edit, one edit after the other. With K = 2 edits and R = 2 rows the batch
   has K R = 4 rows: row 0 under edit 0, row 1 under edit 0, row 0 under edit 1, row 1 under edit 1.
3. `run_prefix` runs the tokens that all prompts share once per edit, and `cache_of` copies its KV cache to every row.
4. `run_trees` runs the batch and returns the last hidden states (K R, tokens, d). With a `Start`, it begins at the
   lowest edited layer instead of the embedding.
5. `token_log_probs` gives the log-probability of each predicted token, `branch_sums` adds them up for each answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from locaudit.edits import EditBank
from locaudit.edits.hooks import resumed
from locaudit.errors import ModelError
from locaudit.location import ROLES
from locaudit.measure.head import head_log_probs
from locaudit.measure.tree import Forest, Tree, TreeBatch, additive_mask, collate, pack
from locaudit.models import CACHE, Model
from locaudit.models.memory import of_device
from locaudit.models.model import setting

Prefix = list[tuple[Tensor, Tensor]]
"""The prefix's KV cache under K edits: for each layer, keys and values (K, KV heads, prefix tokens, head_dim)."""


@dataclass(frozen=True)
class Start:
    """Where a forward begins if it skips the lowest decoder layers, which no edit changes."""

    layer: int
    """The first decoder layer that runs."""
    hidden: Float[Tensor, "rows tokens d"]
    """The residual stream that enters `layer`, for each row of the batch."""
    prefix: Float[Tensor, "prefix d"] | None = None
    """The residual stream of the forest's prefix that enters `layer`, for `run_prefix`; None without a prefix."""


class Starts(Protocol):
    """Gives the `Start` of a forward; implemented by `locaudit.measure.residual.Residuals`."""

    def start(self, layer: int, rows: Sequence[Sequence[int]], n_columns: int, n_edits: int = 1) -> Start | None:
        """The start at `layer` for rows of tree numbers, repeated for each edit; None means that all layers run."""


ROW_TOKENS = {"cpu": 640, "cuda": 16384}
"""Tokens in one forward when scoring, by device: rows x padded length, counted over all edits."""

ROW_LENGTH = 256
"""Most tokens of trees that share a row. Longer rows need less padding and fewer copies of the prefix's cache, but
attention costs more."""

BUCKET = 32
"""Rows of 16-bit models are padded to a multiple of this number, because a kernel is built for each new shape."""


def answer_log_probs(
    model: Model,
    forest: Forest,
    bank: EditBank | None = None,
    *,
    prefix: Prefix | None = None,
    residuals: Starts | None = None,
    row_tokens: int | None = None,
) -> list[Float[Tensor, "k answers"]]:
    """Log-probability (nats, float32) of every answer of every tree, under each edit of the bank, summed over tokens.

    Returns one tensor (K, answers) per tree. Without a bank, K = 1 and the model is unedited. If `run_prefix` was
    already called for this forest's prefix and this bank, pass its result as `prefix`. With `residuals` of this forest,
    forwards begin at the lowest edited layer. `row_tokens` limits the tokens in a forward, with padding (None:
    `ROW_TOKENS`). Batching, order and padding change the result only by rounding. Raises `ModelError` if a path is too
    long for the model's context.
    """
    check_depth(model, forest)
    n_edits, lowest = (bank.n_edits, bank.lowest_layer) if bank else (1, 0)
    out: list[Tensor | None] = [None] * len(forest.trees)
    with torch.no_grad():
        for rows, batch in forest_batches(model, forest, n_edits, row_tokens=row_tokens):
            start = residuals.start(lowest, rows, batch.input_ids.shape[1], n_edits) if residuals else None
            if prefix is None:
                prefix = run_prefix(model, forest.prefix, bank, start)
            edit_of = torch.arange(n_edits).repeat_interleave(len(rows))  # (K R,): 0 0 1 1 for K = 2, R = 2
            sums = branch_sums(batch, token_log_probs(model, batch, bank, edit_of, prefix, start))  # (K branches,)
            numbers = [i for row in rows for i in row]
            # The rows of one edit are consecutive, and so are its branches: (K, branches), then split by tree.
            pieces = sums.view(n_edits, -1).split([len(forest.trees[i].branches) for i in numbers], dim=1)
            for i, piece in zip(numbers, pieces, strict=True):
                out[i] = piece.cpu()
    return out  # type: ignore[return-value]


def batches(lengths: Sequence[int], row_tokens: int, n_rows: int | None = None) -> Iterator[list[int]]:
    """Group rows of similar length into batches. Yields the row numbers of each batch, shortest rows first.

    Padded to its longest row, a batch has at most `row_tokens` tokens, unless it is a single row. It has at most
    `n_rows` rows (None: any number).
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
    """Pack a forest into batches. For each forward, yields the tree numbers of each row, and the batch.

    The batch holds these rows once for each of `n_edits` edits. It has at most `row_tokens` tokens with padding (None:
    `ROW_TOKENS`), unless it has only one row per edit. With `ends`, the branches' last tokens get columns too.
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
    """Collate rows of trees for K edits, on the model's device: all rows of edit 0, then all rows of edit 1, ..."""
    multiple = BUCKET if model.lm.dtype != torch.float32 else 1
    batch = collate(list(rows) * n_edits, n_prefix=n_prefix, pad_id=model.pad_id, ends=ends, multiple=multiple)
    return replace(batch, **{f.name: getattr(batch, f.name).to(model.device) for f in fields(batch)})


def run_prefix(model: Model, prefix: Sequence[int], bank: EditBank | None, start: Start | None = None) -> Prefix | None:
    """Run the prefix once under each edit and return its KV cache; None for an empty prefix.

    Gradients flow through it if they are enabled. With a `start`, the layers below it do not run, and their keys and
    values in the cache are placeholders. Nothing reads these, because the rows skip the same layers.
    """
    if not prefix:
        return None
    n_edits = bank.n_edits if bank else 1
    ids = torch.tensor(prefix, device=model.device).expand(n_edits, -1)  # (K, P): row k runs under edit k
    rows = torch.arange(n_edits, device=model.device)
    cache = DynamicCache()
    first = 0
    with ExitStack() as stack:
        if start is not None and start.prefix is not None:
            first = start.layer
            stack.enter_context(resumed(model, first, start.prefix.expand(n_edits, -1, -1)))  # (K, P, d)
        if bank:
            stack.enter_context(bank.applied(model, rows, torch.full_like(ids, ROLES["prompt"])))
        model.lm.base_model(
            input_ids=ids,
            position_ids=torch.arange(len(prefix), device=model.device).expand(n_edits, -1),
            use_cache=True,
            **{CACHE: cache},
        )
    kept = [(layer.keys, layer.values) for layer in cache.layers[first:]]  # type: ignore[union-attr]
    # transformers reads the cache's length from its first layer: the placeholders (K, 1, P, 1) have P tokens.
    blank = ids.new_zeros(1, dtype=model.lm.dtype).expand(n_edits, 1, len(prefix), 1)
    return [(blank, blank)] * first + kept  # type: ignore[return-value]


def cache_of(prefix: Prefix, rows: Int[Tensor, " rows"]) -> DynamicCache:
    """Copy the prefix's KV cache to the rows of a batch. Row r gets the cache of edit ``rows[r]``."""
    cache = DynamicCache()
    for layer, pair in enumerate(prefix):
        keys, values = (part.index_select(0, rows.to(part.device)) for part in pair)  # (rows, heads, P, head_dim)
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
    """Log-probability (nats, float32) of each of the batch's n predictions, with row r under edit ``rows[r]``.

    Logits are computed only at columns from which something is predicted, one block of the vocabulary at a time.
    """
    row, predictor, token = batch.target
    # `where` (m,) has the indices, in the flattened batch, of the m columns that predict something. Prediction i is
    # made from where[which[i]]. Each column is taken once, with index_select. Plain indexing with repeats would add up
    # gradients in no fixed order on a CPU with several threads, and training would not repeat bit for bit.
    where, which = torch.unique(row * batch.input_ids.shape[1] + predictor, return_inverse=True)
    states = run_trees(model, batch, bank, rows, prefix, start).flatten(0, 1)  # (rows tokens, d)
    chosen = states.index_select(0, where.to(states.device))  # (m, d), or logits (m, vocabulary)
    return state_log_probs(model, chosen, which, token)


def state_log_probs(
    model: Model, states: Float[Tensor, "m d"], which: Int[Tensor, " n"], token: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Log-probability (nats, float32) of ``token[i]`` after ``states[which[i]]``; `states` come from `last_states`."""
    if model.head is not None:
        device = model.head.weight.device
        return head_log_probs(states.to(device), model.head, which.to(device), token.to(device))
    which, token, states = which.to(states.device), token.to(states.device), states.float()
    return states[which, token] - states.logsumexp(dim=1)[which]


def last_states(model: Model, **inputs: Any) -> Float[Tensor, "rows tokens d"]:
    """Run the model and return its last hidden states.

    If `Head` cannot describe the model's output head, logits (rows, tokens, vocabulary) are returned instead.
    """
    return model.lm(**inputs).logits if model.head is None else model.lm.base_model(**inputs).last_hidden_state


def run_trees(
    model: Model,
    batch: TreeBatch,
    bank: EditBank | None = None,
    rows: Int[Tensor, " rows"] | None = None,
    prefix: Prefix | None = None,
    start: Start | None = None,
) -> Float[Tensor, "rows tokens d"]:
    """Run the batch, with row r under edit ``rows[r]`` (None: edit 0), and return its `last_states`."""
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
            stack.enter_context(bank.applied(model, rows, batch.roles))
        return last_states(model, **keywords)


def branch_sums(batch: TreeBatch, values: Float[Tensor, " n"]) -> Float[Tensor, " branches"]:
    """Sum values of predictions over each branch. This turns log-probabilities of tokens into those of answers."""
    branch, step = batch.path.to(values.device)
    return values.new_zeros(batch.n_branches).index_add(0, branch, values.index_select(0, step))


_FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary positions with the same frequencies for texts of all lengths. Other kinds may change the frequencies
after ``original_max_position_embeddings`` tokens. Then a cached primer and the text after it could differ in them."""


def check_depth(model: Model, forest: Forest) -> None:
    """Raise `ModelError` if a path of the forest is too long (`check_length`) or has tokens that the model lacks."""
    if forest.trees:
        n_embeddings = model.lm.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
        paths = [forest.prefix, *(ids for tree in forest.trees for ids in (tree.prompt, *tree.branches))]
        if (largest := max(max(ids, default=0) for ids in paths)) >= n_embeddings:
            raise ModelError(
                got=f"the token {largest} in a question or answer, but only {n_embeddings} embeddings in {model.name}",
                expected="a tokenizer that belongs to the model",
                remedy="load the model with its own tokenizer",
            )
        check_length(model, forest.depth, "a question with an answer (prompt included)", len(forest.prefix))


def check_length(model: Model, n_tokens: int, what: str, n_primer: int = 0) -> None:
    """Raise `ModelError` if the model would compute a text of `n_tokens` differently from shorter ones.

    This is the case if the text is longer than the context, than the window or chunk that some layers attend to, or
    than the length at which rotary frequencies change. `what` describes the text in the error; `n_primer` is the number
    of its tokens that are the primer's.
    """
    config = model.config
    longest = setting(config, "max_position_embeddings")
    limits = {
        "context": longest,
        "sliding window": setting(config, "sliding_window"),
        "window of local attention": setting(config, "window_size"),
        "attention chunk": setting(config, "attention_chunk_size"),
    }
    ropes = setting(config, "rope_parameters") or setting(config, "rope_scaling") or {}
    for rope in (ropes, *(inner for inner in ropes.values() if isinstance(inner, dict))):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _FIXED_ROPES:
            given = rope.get("original_max_position_embeddings")
            limits[f"range of {kind} positions"] = (
                given or setting(config, "original_max_position_embeddings") or longest
            )
    for name, limit in limits.items():
        if limit and n_tokens > limit:  # some configs write 0 for no sliding window
            room = limit - (n_tokens - n_primer)
            shorter = (
                f"shorten prompt.primer from {n_primer} to at most {room} tokens"
                if n_primer and room > 0
                else ("use no primer (prompt.primer)" if n_primer else "shorten prompt.primer")
            )
            raise ModelError(
                got=f"{what} of {n_tokens} tokens, for a model with a {name} of {limit} tokens",
                expected=f"at most {limit} tokens",
                remedy=f"{shorter}, remove long questions, lower evaluation.max_new_tokens or "
                "evaluation.drift_tokens, or use another model",
            )
