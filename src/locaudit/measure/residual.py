"""Below the lowest edited layer nothing changes: residual streams kept there, so that forwards start from them.

An edit of layer l leaves what enters layer l as it was. That is read once from the unedited model and serves every
step, strength, seed and location whose lowest layer is l.
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
"""Most that is kept of one forest; the layers used longest ago go first."""

Streams = tuple[tuple[Float[Tensor, "tokens d"], ...], Float[Tensor, "prefix d"] | None]
"""Of each tree, and of the prefix."""


class Residuals:
    """A forest's residual streams under the unedited model, by the layer that they enter; read when first needed."""

    def __init__(self, model: Model, forest: Forest, *, budget_bytes: int = BUDGET_BYTES):
        self.model, self.forest = model, forest
        width = model.lm.get_input_embeddings().weight.shape[1] * model.lm.dtype.itemsize  # type: ignore[union-attr]
        n_kept = budget_bytes // max((forest.n_tokens + len(forest.prefix)) * width, 1)
        self._n_kept = int(min(n_kept, model.n_layers))
        self._at = lru_cache(self._n_kept)(self._read)

    def start(self, layer: int, rows: Sequence[Sequence[int]], n_columns: int, n_edits: int = 1) -> Start | None:
        """Where a forward of rows of trees (by number), all repeated for each edit, may begin: at `layer`.

        None if nothing would be saved, one layer is more than the budget, or the architecture does not allow it.
        """
        if layer <= 0 or not self._n_kept or not is_resumable(self.model):
            return None
        streams, prefix = self._at(layer)
        hidden = streams[0].new_zeros(len(rows), n_columns, streams[0].shape[1])
        for number, row in enumerate(rows):
            filled = torch.cat([streams[i] for i in row])
            hidden[number, : len(filled)] = filled
        return Start(layer, hidden.repeat(n_edits, 1, 1), prefix)

    @torch.no_grad()
    def _read(self, layer: int) -> Streams:
        # Always from the first layer and in the same batches: a stream does not depend on what was read before it.
        model, forest = self.model, self.forest
        prefix, stream = run_prefix(model, forest.prefix, None), None
        if prefix is not None:
            stream = entering(model, layer, lambda: run_prefix(model, forest.prefix, None))[0]
        out: list[Tensor | None] = [None] * len(forest.trees)
        for rows, batch in forest_batches(model, forest):
            found = entering(model, layer, lambda b=batch: run_trees(model, b, prefix=prefix))  # (rows, tokens, d)
            for row, hidden in zip(rows, found, strict=True):
                lengths = [len(forest.trees[i]) for i in row]
                for i, piece in zip(row, hidden[: sum(lengths)].split(lengths), strict=True):
                    out[i] = piece.clone()
        return tuple(out), stream  # type: ignore[return-value]


_RESUMABLE: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


def is_resumable(model: Model) -> bool:
    """Whether a forward started in the middle layer ends as a whole one does (tried once, on four tokens)."""
    if model not in _RESUMABLE:
        ids = torch.arange(4, device=model.device).unsqueeze(0)
        layer = model.n_layers // 2

        def forward() -> Tensor:
            return model.lm(input_ids=ids, use_cache=False).logits.float()

        with torch.no_grad():
            whole = forward()
            hidden = entering(model, layer, forward)
            with resumed(model, layer, hidden):
                resumed_there = forward()
        _RESUMABLE[model] = bool((whole - resumed_there).abs().max() <= 1e-5 * whole.abs().max())
    return _RESUMABLE[model]
