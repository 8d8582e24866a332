"""Means of speed that other libraries offer, tried on our work: fused and sparse attention, compilers, preparation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch.nn.attention.flex_attention import create_block_mask

import locaudit.measure.forward as forward
import locaudit.methods.training as loop
from locaudit.edits import Edit, SiteEdit, stack
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.generation import generate_answers
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, TreeBatch
from locaudit.methods.training import Job, TrainingData, train
from locaudit.models import Model


@dataclass(frozen=True)
class Mean:
    """One means: work with it and without it."""

    name: str
    work: str
    predicted: float | None
    """Ratio that counting says: tokens, or vectors through the layers; None where nothing is saved but overhead."""
    with_it: Callable[[], Any]
    without: Callable[[], Any]


def attention(model: Model, data: TrainingData, primed: Forest) -> list[Mean]:
    """The tree's mask in one fused kernel, in plain PyTorch, and in FlexAttention, which skips what the mask hides."""
    nothing = Residuals(model, data.forest, budget_bytes=0)

    def fit() -> Any:
        return train(model, data, [Job(model.whole(), 0.2, 0)], epochs=1, residuals=nothing)

    def under(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        def go() -> Any:
            before = model.lm.config._attn_implementation
            model.lm.set_attn_implementation(name)
            try:
                return run()
            finally:
                model.lm.set_attn_implementation(before)

        return go

    score = lambda: answer_log_probs(model, primed)  # noqa: E731
    found = [
        Mean("fused attention (SDPA) with the tree's mask", "training, all heads", None, fit, under("eager", fit)),
        Mean("fused attention (SDPA) with the tree's mask", "scoring with primer", None, score, under("eager", score)),
    ]
    if model.device.type != "cpu" or shutil.which("c++"):  # it is compiled; on a CPU it has no backward pass
        # Kernels for each shape: PyTorch 2.13's for changing ones does not compile on a CPU.
        flex = under("flex_attention", off(dynamo, "automatic_dynamic_shapes", False,
                                           off(forward, "additive_mask", _block_mask, score)))  # fmt: skip
        name = "FlexAttention that skips what the tree's mask hides"
        found.append(Mean(name, "scoring with primer", _attention_saved(model, primed), flex, score))
    return found


def _block_mask(batch: TreeBatch, n_prefix: int, dtype: torch.dtype):
    """What `additive_mask` says, as FlexAttention takes it."""
    visible = batch.visible
    rows, columns = batch.input_ids.shape

    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < n_prefix) | visible[row, query, (key - n_prefix).clamp(min=0)]

    return create_block_mask(seen, rows, None, columns, n_prefix + columns, device=str(visible.device))


def _attention_saved(model: Model, forest: Forest) -> float:
    """Operations of the layers with every pair of columns over those with the visible pairs alone."""
    layer = sum(p.numel() for p in model.layer(0).parameters())
    width, n_prefix, dense, sparse = model.width(("heads", 0)), len(forest.prefix), 0, 0
    for rows in forward.packed_rows([len(tree) for tree in forest.trees], forward.default_row_tokens(model)):
        batch = forward.collate_bank([[forest.trees[i] for i in row] for row in rows], 1, n_prefix, model)
        n_rows, n_columns = batch.input_ids.shape
        behind = n_rows * n_columns * n_prefix
        dense += 2 * layer * n_rows * n_columns + 4 * width * (behind + n_rows * n_columns**2)
        sparse += 2 * layer * n_rows * n_columns + 4 * width * (behind + int(batch.visible.sum()))
    return dense / sparse


def beforehand(model: Model, data: TrainingData) -> list[Mean]:
    """Batches and masks made before the clock starts: no preparation in the background could save more."""
    kept: dict[Any, Any] = {}

    def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
        def go(what: Any, *args: Any, **keywords: Any) -> Any:
            named = tuple(tuple(map(id, row)) for row in what) if isinstance(what, list) else id(what)
            key = (function, named)
            if key not in kept:  # with `what`, so that nothing else can come to have its identity
                kept[key] = (what, function(what, *args, **keywords))
            return kept[key][1]

        return go

    nothing = Residuals(model, data.forest, budget_bytes=0)

    def fit() -> Any:
        return train(model, data, [Job(model.whole(), 0.2, 0)], epochs=1, residuals=nothing)

    def go() -> Any:
        with (
            patch.object(loop, "collate_bank", keeping(loop.collate_bank)),
            patch.object(forward, "additive_mask", keeping(forward.additive_mask)),
        ):
            return fit()

    return [Mean("batches prepared in the background (at no cost)", "training, all heads", None, go, fit)]


def compiled(model: Model, primed: Forest) -> list[Mean]:
    """`torch.compile` of the feed-forward blocks; the attention blocks hold the hooks of the edits."""
    if shutil.which("c++") is None and model.device.type == "cpu":
        return []
    edits, found = [edit(model, 0)], {}
    for block in (model.layer(i).mlp for i in range(model.n_layers)):
        block.compile(dynamic=True)
        found[block], block._compiled_call_impl = block._compiled_call_impl, None

    def run() -> None:
        for block, call in found.items():
            block._compiled_call_impl = call
        try:
            generate(model, primed, edits)
        finally:
            for block in found:
                block._compiled_call_impl = None

    return [Mean("compiled feed-forward blocks", "generating", None, run,
                 lambda: generate(model, primed, edits))]  # fmt: skip


def off(target: Any, name: str, value: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with something plain in the place of what is measured."""

    def go() -> Any:
        with patch.object(target, name, value):
            return run()

    return go


def edit(model: Model, seed: int) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    width = model.width(("heads", 0))
    site = SiteEdit(*(0.1 * torch.randn(width, generator=generator) / width**0.5 for _ in range(2)), 0.0)
    return Edit({("heads", layer): site for layer in range(model.n_layers)})


def generate(model: Model, forest: Forest, edits: list[Edit]):
    return generate_answers(
        model, forest.prefix, [t.prompt for t in forest.trees], stack(model, edits), max_new_tokens=24
    )
