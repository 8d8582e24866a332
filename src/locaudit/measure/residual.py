"""Cached residual streams, from which forwards start at the lowest edited layer.

An edit whose lowest layer is l does not change the residual stream that enters layer l. Therefore this stream is
computed once, in the unedited model. It is used in every training step, for every strength and seed, and for all
locations with the same lowest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.edits.hooks import entering, resumed
from locaudit.measure.forward import Start, forest_batches, run_prefix, run_trees
from locaudit.measure.tree import Forest
from locaudit.models import Model

BUDGET_BYTES = 2**30
"""Memory for one forest's cached streams; the least recently used layers are dropped first."""

Streams = tuple[tuple[Float[Tensor, "tokens d"], ...], Float[Tensor, "prefix d"] | None]
"""The residual stream that enters one layer: for each tree's columns, and for the prefix (None without a prefix)."""


class Residuals:
    """Cache of a forest's residual streams in the unedited model: one entry per layer, computed when it is needed."""

    def __init__(self, model: Model, forest: Forest, *, budget_bytes: int = BUDGET_BYTES):
        self.model, self.forest = model, forest
        width = model.lm.get_input_embeddings().weight.shape[1] * model.lm.dtype.itemsize  # type: ignore[union-attr]
        n_kept = budget_bytes // max((forest.n_tokens + len(forest.prefix)) * width, 1)
        self._n_kept = int(min(n_kept, model.n_layers))
        self._at = lru_cache(self._n_kept)(self._read)

    def start(self, layer: int, rows: Sequence[Sequence[int]], n_columns: int, n_edits: int = 1) -> Start | None:
        """The `Start` at `layer` of a forward over rows of tree numbers, repeated for each edit.

        `n_columns` is the batch's padded length. Returns None, so that the forward runs all layers, in three cases:
        `layer` is 0, one layer's streams exceed the budget, or the architecture cannot start in the middle
        (`is_resumable`).
        """
        if layer <= 0 or not self._n_kept or not is_resumable(self.model):
            return None
        streams, prefix = self._at(layer)
        hidden = streams[0].new_zeros(len(rows), n_columns, streams[0].shape[1])  # (rows, tokens, d), 0 at padding
        for number, row in enumerate(rows):
            filled = torch.cat([streams[i] for i in row])
            hidden[number, : len(filled)] = filled
        return Start(layer, hidden.repeat(n_edits, 1, 1), prefix)  # (K rows, tokens, d): all rows of edit 0 first

    @torch.no_grad()
    def _read(self, layer: int) -> Streams:
        # Computed from the first layer and always in the same batches. So rounding does not depend on which other
        # layers are in the cache.
        model, forest = self.model, self.forest
        prefix, stream = run_prefix(model, forest.prefix, None), None
        if prefix is not None:
            stream = entering(model, layer, lambda: run_prefix(model, forest.prefix, None))[0]
        out: list[Tensor | None] = [None] * len(forest.trees)
        for rows, batch in forest_batches(model, forest):
            found = entering(model, layer, lambda b=batch: run_trees(model, b, prefix=prefix))  # (rows, tokens, d)
            for row, hidden in zip(rows, found, strict=True):
                lengths = [len(forest.trees[i]) for i in row]
                # Cut the row's columns, without padding, into the pieces of its trees: (columns of tree i, d).
                for i, piece in zip(row, hidden[: sum(lengths)].split(lengths), strict=True):
                    out[i] = piece.clone()
        return tuple(out), stream  # type: ignore[return-value]


_RESUMABLE: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


def is_resumable(model: Model) -> bool:
    """Whether forwards that start in the middle layer and in the last layer give the same result as a full forward.

    This is tested once per model, on four tokens. Differences up to 1e-5 of the largest entry are allowed.
    """
    if model not in _RESUMABLE:
        ids = torch.arange(4, device=model.device).unsqueeze(0)

        def forward() -> Tensor:
            return model.lm(input_ids=ids, use_cache=False).logits.float()

        def is_same(layer: int) -> bool:
            hidden = entering(model, layer, forward)
            with resumed(model, layer, hidden):
                try:
                    found = forward()
                except (RuntimeError, TypeError, LookupError):  # a layer needs more of lower layers than the stream
                    return False
            return bool((whole - found).abs().max() <= 1e-5 * whole.abs().max())

        with torch.no_grad():
            whole = forward()
            layers = {model.n_layers // 2, model.n_layers - 1}
            _RESUMABLE[model] = "residual" not in model.lacks and all(map(is_same, layers))
    return _RESUMABLE[model]
