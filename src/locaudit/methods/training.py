"""One training loop for K edits: each step, every edit gets its own batch as rows of one forward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from locaudit.edits import Edit
from locaudit.errors import ConfigError, DataError, ModelError
from locaudit.lean import lean
from locaudit.location import Location
from locaudit.measure.forward import ROW_LENGTH, branch_sums, check_depth, collate_bank, run_prefix, token_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, Tree, pack
from locaudit.memory import part_tokens, room, run_again
from locaudit.methods.objectives import Objective, Reduction, default_learning_rate, log_ratios, pair_loss
from locaudit.methods.optimizers import OptimizerName, make_optimizer
from locaudit.methods.parameters import Reader, TrainableEdit, stack_trainable
from locaudit.models import Model

Batching = Literal["question", "pair"]

BATCH_SIZES: dict[str, int] = {"question": 2, "pair": 4}
"""Questions, or pairs (the paper's), a step."""


def step_size(batching: Batching, batch_size: int | None) -> int:
    """Questions or pairs of a step; `batch_size` where it is set."""
    return batch_size or BATCH_SIZES[batching]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Training questions as trees whose first branches are the true answers, with the unedited model's scores."""

    forest: Forest
    n_true: tuple[int, ...]
    """True answers of each tree."""
    reference: tuple[Tensor, ...]
    """log pi_0 of each tree's branches, summed over tokens."""


@dataclass(frozen=True)
class Job:
    """One edit to train."""

    location: Location
    strength: float
    """tau of IPO or beta of DPO."""
    seed: int
    """Of the order of questions and of the initial reader."""
    learning_rate: float | None = None
    """None: `default_learning_rate`."""


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained edit; None, with a message, if its loss or gradient stopped being finite."""

    edit: Edit | None
    losses: tuple[float, ...]
    """Mean loss over the pairs of each step."""
    message: str = ""


@dataclass(frozen=True)
class _Item:
    """What a step draws: a tree, its pairs as branch numbers, and its reference scores."""

    number: int
    """Of its tree among all items'."""
    tree: Tree
    pairs: tuple[tuple[int, int], ...]
    reference: Tensor


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: Model,
    data: TrainingData,
    jobs: Sequence[Job],
    *,
    objective: Objective = "ipo",
    reduction: Reduction = "sum",
    reader: Reader = "layer",
    batching: Batching = "question",
    batch_size: int | None = None,
    epochs: int = 2,
    max_grad_norm: float = 1.0,
    optimizer: OptimizerName = "adamw",
    residuals: Residuals | None = None,
    step_tokens: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Fit]:
    """Train the best edit at each job's location; jobs run as rows of one batch and do not influence each other.

    Per step and job the loss is the mean of `pair_loss` over the pairs of its batch: all true-false pairs of
    `batch_size` questions, from their trees (``question``), or `batch_size` single pairs (``pair``, the paper). AdamW
    without weight decay (`optimizer` may name its paged form), cosine schedule to 0 without warm-up, gradients clipped
    to `max_grad_norm` for each edit (transformers' Trainer does so by default). Every job sees every question or pair
    `epochs` times, in an order of its own seed. A job whose loss or gradient is not finite stops, alone. Weights are
    frozen, so gradients stop at the lowest edited layer, and forwards start there from residual streams read once;
    `residuals` keeps those of ``data.forest`` for other calls. A step of more than `step_tokens` tokens an edit (None:
    by device, weights and lowest layer) runs in parts that keep no more than so many tokens do, whose gradients add up;
    in some layers attention, and in a longer question MLPs, run again in the backward pass (not for edits of neurons):
    the same step in less memory.

    `on_step` is called with (steps done, steps in all).
    """
    _check_arguments(jobs, reduction, reader, batching, batch_size, epochs)
    if any(parameter.is_inference() for parameter in model.lm.parameters()):
        raise ModelError(
            got="a model whose weights were made under torch.inference_mode",
            expected="weights that a backward pass may use",
            remedy="load the model outside of inference_mode",
        )
    check_depth(model, data.forest)
    items = _items(data, batching)
    if residuals is None or batching == "pair":
        residuals = Residuals(model, Forest(data.forest.prefix, tuple(item.tree for item in items)))
    size = step_size(batching, batch_size)
    orders = [_order(len(items), size, epochs, job.seed) for job in jobs]
    n_steps = len(orders[0])
    edits = [TrainableEdit(model, job.location, reader=reader, seed=job.seed) for job in jobs]
    whole = {job.location.kind: model.n_layers * model.n_units(job.location.kind) for job in jobs}
    rates = [
        job.learning_rate or default_learning_rate(batching, len(job.location), whole[job.location.kind])
        for job in jobs
    ]
    groups = [
        {"params": [p for p in edit.parameters() if p.requires_grad], "lr": rate}
        for edit, rate in zip(edits, rates, strict=True)
    ]
    adamw = make_optimizer(optimizer, groups, model.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda t: 0.5 * (1 + math.cos(math.pi * t / n_steps)))
    kinds = {job.location.kind for job in jobs}
    limit = step_tokens or part_tokens(
        model, min(job.location.layers[0] for job in jobs), "neurons" if "neurons" in kinds else "heads"
    )
    of_part = room(model, limit, cached=bool(data.forest.prefix)) if kinds == {"heads"} else limit
    losses: list[list[float]] = [[] for _ in jobs]
    stopped: dict[int, str] = {}
    for step in range(n_steps):
        drawn = [[items[i] for i in order[step]] for order in orders]
        adamw.zero_grad(set_to_none=True)
        loss = torch.zeros(len(jobs), device=model.device)
        for part in _parts(drawn, of_part):
            found = _part_losses(model, residuals, part, drawn, jobs, edits, objective, reduction, limit)
            torch.where(found.isfinite(), found, 0.0).sum().backward()
            loss += found.detach().to(loss.device)
        for k, edit in enumerate(edits):
            if k in stopped:
                continue
            losses[k].append(loss[k].item())
            norm = torch.nn.utils.clip_grad_norm_(edit.parameters(), max_grad_norm)
            if not (math.isfinite(losses[k][-1]) and bool(norm.isfinite())):
                stopped[k] = f"loss {losses[k][-1]:g}, gradient norm {norm.item():g} at step {step + 1} of {n_steps}"
        for k in stopped:
            _reset(edits[k])
        adamw.step()
        schedule.step()
        if on_step:
            on_step(step + 1, n_steps)
        if len(stopped) == len(jobs):
            break
    fits = []
    for k, edit in enumerate(edits):
        result = edit.to_edit()
        if k not in stopped and not result.is_finite:
            stopped[k] = "the trained edit is not finite"
        finite = tuple(x for x in losses[k] if math.isfinite(x))
        fits.append(Fit(None, finite, stopped[k]) if k in stopped else Fit(result, finite))
    return fits


def _check_arguments(
    jobs: Sequence[Job], reduction: str, reader: str, batching: str, batch_size: int | None, epochs: int
) -> None:
    checks = [
        (reduction in ("sum", "mean"), f"reduction {reduction!r}", "'sum' or 'mean'"),
        (reader in ("layer", "location", "none"), f"reader {reader!r}", "'layer', 'location' or 'none'"),
        (batching in BATCH_SIZES, f"batching {batching!r}", "'question' or 'pair'"),
        (batch_size is None or batch_size >= 1, f"batch_size {batch_size}", "at least 1"),
        (epochs >= 1, f"epochs {epochs}", "at least 1"),
        (all(job.strength > 0 for job in jobs), f"strengths {[job.strength for job in jobs]}", "positive numbers"),
        (
            all(job.learning_rate is None or job.learning_rate > 0 for job in jobs),
            f"learning rates {[job.learning_rate for job in jobs]}",
            "positive numbers or None",
        ),
    ]
    for ok, got, expected in checks:
        if not ok:
            raise ConfigError(got=got, expected=expected, remedy="change the argument")


def _reset(edit: TrainableEdit) -> None:
    """Take a stopped edit out: zero, so that its rows stay finite, and without gradients."""
    for parameter in edit.parameters():
        parameter.data.zero_()
        parameter.grad = None


def _items(data: TrainingData, batching: Batching) -> list[_Item]:
    items = []
    for tree, n_true, reference in zip(data.forest.trees, data.n_true, data.reference, strict=True):
        pairs = [(t, f) for t in range(n_true) for f in range(n_true, len(tree.branches))]
        if batching == "question":
            items.append(_Item(len(items), tree, tuple(pairs), reference))
        else:
            for t, f in pairs:
                pair = Tree(tree.prompt, (tree.branches[t], tree.branches[f]))
                items.append(_Item(len(items), pair, ((0, 1),), reference[[t, f]]))
    if not items:
        raise DataError(got="no training question", expected="at least one", remedy="check split.max_train")
    return items


def _order(n: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Item numbers of each step."""
    rng = random.Random(seed)
    steps = []
    for _ in range(epochs):
        order = list(range(n))
        rng.shuffle(order)
        steps += [order[i : i + size] for i in range(0, n, size)]
    return steps


def _parts(drawn: Sequence[Sequence[_Item]], limit: int) -> list[list[list[_Item]]]:
    """A step's items in parts of at most `limit` tokens an edit, or of one item; every edit has items in each part.

    Edits draw as many items as each other, so a part takes as many of each.
    """
    parts: list[list[list[_Item]]] = []
    held = [0] * len(drawn)
    for row in zip(*drawn, strict=True):
        sizes = [len(item.tree) for item in row]
        if not parts or any(tokens + size > limit for tokens, size in zip(held, sizes, strict=True)):
            parts.append([[] for _ in drawn])
            held = [0] * len(drawn)
        for k, item in enumerate(row):
            parts[-1][k].append(item)
            held[k] += sizes[k]
    return parts


def _part_losses(
    model: Model,
    residuals: Residuals,
    drawn: Sequence[Sequence[_Item]],
    step: Sequence[Sequence[_Item]],
    jobs: Sequence[Job],
    edits: Sequence[TrainableEdit],
    objective: Objective,
    reduction: Reduction,
    limit: int,
) -> Tensor:
    """Each job's share (K,) of its step's loss that falls to the items of a part, `drawn`.

    A part of more than `limit` tokens, a prefix's included, runs attention and MLPs again in the backward pass.
    """
    bank = stack_trainable(edits)
    prefix_ids = residuals.forest.prefix
    # An edit's questions share rows; from here on they stand in the order of the rows.
    packed = [pack([len(item.tree) for item in items], ROW_LENGTH) for items in drawn]
    filled = [[items[i] for i in row] for items, rows in zip(drawn, packed, strict=True) for row in rows]
    drawn = [[items[i] for row in rows for i in row] for items, rows in zip(drawn, packed, strict=True)]
    batch = collate_bank([[item.tree for item in row] for row in filled], 1, len(prefix_ids), model)
    rows = torch.tensor([k for k, of_edit in enumerate(packed) for _ in of_edit])
    start = residuals.start(bank.lowest_layer, [[item.number for item in row] for row in filled], batch.n_columns)
    n_tokens = len(prefix_ids) + max(sum(len(item.tree) for item in items) for items in drawn)
    again = run_again(model, n_tokens, limit, bank.lowest_layer, cached=bool(prefix_ids))
    with lean(model, again) if all(job.location.kind == "heads" for job in jobs) else nullcontext():
        prefix = run_prefix(model, prefix_ids, bank, start)
        tokens = token_log_probs(model, batch, bank, rows, prefix, start)
    sums = branch_sums(batch, tokens)
    reference = torch.cat([item.reference for items in drawn for item in items]).to(sums.device)
    ratios = log_ratios(sums, reference, batch.lengths.to(sums.device), reduction)
    losses, start = [], 0
    for items, whole, job in zip(drawn, step, jobs, strict=True):
        true, false = [], []
        for item in items:
            true += [start + t for t, _ in item.pairs]
            false += [start + f for _, f in item.pairs]
            start += len(item.tree.branches)
        n_pairs = sum(len(item.pairs) for item in whole)
        losses.append(pair_loss(ratios[true] - ratios[false], objective, job.strength).sum() / n_pairs)
    return torch.stack(losses)
