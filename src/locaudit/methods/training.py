"""Training of K edits in one loop: in each step, every edit has its own questions, as rows of one forward.

A step with K = 2 edits and 2 questions per edit:

1. Each edit draws its questions, in an order that depends on its own seed.
2. If a step is larger than `PART_TOKENS` tokens per edit, `_parts` splits it; gradients of the parts add up.
3. `_margins` packs each edit's trees into rows. Suppose edit 0's two trees fit in one row and edit 1's need two: the
   batch has 3 rows, and ``edit_of = [0, 1, 1]`` names the edit of each. The forward gives the log-probability of every
   answer, from it the log-ratio r(y), and for each (true, false) pair the margin h = r(y+) - r(y-).
4. `_backward` averages the loss, such as (h - 1 / (2 tau))^2, over each edit's pairs. The K means are added and
   differentiated together. Each depends on its own edit's parameters only, so the edits do not influence each other.
5. Each edit's gradient is clipped by itself, and one AdamW step updates all edits, each at its own learning rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.errors import ConfigError, DataError, ModelError
from locaudit.measure.forward import ROW_LENGTH, branch_sums, check_depth, collate_bank, run_prefix, token_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest, Tree, pack
from locaudit.methods.base import Fit
from locaudit.methods.objectives import log_ratios
from locaudit.methods.optimizers import make_optimizer
from locaudit.methods.parameters import TrainableEdit, stack_trainable
from locaudit.methods.settings import Batching, Reduction, TrainingSettings
from locaudit.models import Model
from locaudit.models.memory import of_device
from locaudit.registry import OBJECTIVES

BATCH_SIZES: dict[str, int] = {"question": 2, "pair": 4}
"""Questions per step, or pairs per step (4 in the paper)."""

PART_TOKENS = {"cpu": 160, "cuda": 16384}
"""Tokens per edit in one forward and backward pass, by device. More would need more memory and hardly save time."""


def step_size(batching: Batching, batch_size: int | None) -> int:
    """Number of questions or pairs in a step: `batch_size`, or the default if it is None."""
    return batch_size or BATCH_SIZES[batching]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Training questions as answer trees, true answers first, with the unedited model's log-probabilities."""

    forest: Forest
    n_true: tuple[int, ...]
    """Number of true answers of each tree; they are its first branches."""
    reference: tuple[Tensor, ...]
    """For each tree, log pi_0 (answers,) of its answers: log-probabilities in nats, summed over tokens."""

    @property
    def mean_pairs(self) -> float:
        """Mean number of pairs of a true and a false answer that a question has."""
        pairs = [n * (len(tree.branches) - n) for tree, n in zip(self.forest.trees, self.n_true, strict=True)]
        return fmean(pairs) if pairs else 0.0

    def first(self, n: int | None) -> TrainingData:
        """The data restricted to the first `n` questions (None: all)."""
        if n is None or n >= len(self.forest.trees):
            return self
        return TrainingData(Forest(self.forest.prefix, self.forest.trees[:n]), self.n_true[:n], self.reference[:n])

    def exchange(self, chosen: Sequence[bool]) -> TrainingData:
        """The data with true and false answers exchanged at the `chosen` trees: their false answers come first."""
        parts = list(zip(self.forest.trees, self.n_true, self.reference, chosen, strict=True))
        forest = Forest(self.forest.prefix, tuple(exchanged(tree, n) if turn else tree for tree, n, _, turn in parts))
        n_true = tuple(len(tree.branches) - n if turn else n for tree, n, _, turn in parts)
        return TrainingData(forest, n_true, tuple(x.roll(-n) if turn else x for _, n, x, turn in parts))


def exchanged(tree: Tree, n_true: int) -> Tree:
    """The tree with its first `n_true` branches, the true answers, after the others."""
    return replace(tree, branches=(*tree.branches[n_true:], *tree.branches[:n_true]))


@dataclass(frozen=True)
class Trainee:
    """One edit to train."""

    start: Callable[[], TrainableEdit]
    """Makes the edit in its initial state."""
    strength: float
    """Strength of the objective: tau of IPO, beta of DPO."""
    seed: int
    """Seed of the order in which it sees the questions."""
    learning_rate: float
    """Learning rate of the first step, before the cosine decay."""


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: Model,
    data: TrainingData,
    trainees: Sequence[Trainee],
    settings: TrainingSettings,
    *,
    residuals: Residuals | None = None,
    step_tokens: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Fit]:
    """Train several edits together, as rows of one batch; each ends as if it were trained alone, up to rounding.

    In each step, an edit's loss is the mean of the objective over the pairs of its batch. With ``question`` batching
    these are all (true, false) pairs of `batch_size` questions, with ``pair`` batching `batch_size` single pairs (as in
    the paper). Every edit sees every question or pair `epochs` times. The optimiser is AdamW without weight decay, with
    a cosine schedule to 0 without warm-up, and each edit's gradient is clipped to the norm `max_grad_norm`.

    The model's weights are frozen, so forwards can start at the lowest edited layer, from cached residual streams.
    `residuals` is the cache of ``data.forest``; pass it to share it between calls. A step of more than `step_tokens`
    tokens per edit (None: `PART_TOKENS`) runs in parts, whose gradients add up to those of the whole step.

    `on_step` is called with (steps done, steps in all). An edit whose loss or gradient becomes NaN or infinite stops
    and is returned as a `Fit` without an edit; the others go on. Raises `ConfigError` for wrong settings, `DataError`
    without training questions, `ModelError` for a question longer than the context or weights made in inference mode.
    """
    _check(model, trainees, settings)
    assert settings.epochs != "auto"  # checked
    check_depth(model, data.forest)
    items = _items(data, settings.batching)
    if residuals is None or settings.batching == "pair":
        residuals = Residuals(model, Forest(data.forest.prefix, tuple(item.tree for item in items)))
    size = step_size(settings.batching, settings.batch_size)
    runs = [_Run(t, t.start(), _order(len(items), size, settings.epochs, t.seed)) for t in trainees]
    n_steps = len(runs[0].order)
    groups = [
        {"params": [p for p in run.edit.parameters() if p.requires_grad], "lr": run.trainee.learning_rate}
        for run in runs
    ]
    adamw = make_optimizer(settings.optimizer, groups, model.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda t: 0.5 * (1 + math.cos(math.pi * t / n_steps)))
    limit = step_tokens or of_device(PART_TOKENS, model.device)
    for step in range(n_steps):
        drawn = [[items[i] for i in run.order[step]] for run in runs]  # [edit][question or pair]
        adamw.zero_grad(set_to_none=True)
        losses = _backward(model, residuals, drawn, runs, settings, limit)
        for run, loss in zip(runs, losses, strict=True):
            run.end_step(loss, settings.max_grad_norm, f"step {step + 1} of {n_steps}")
        adamw.step()
        schedule.step()
        if on_step:
            on_step(step + 1, n_steps)
        if all(run.stopped for run in runs):
            break
    return [run.fit(settings.epochs) for run in runs]


def progress(losses: Sequence[float], epochs: int) -> dict[str, float]:
    """How far training got, from the loss of each step: ``objective`` and ``change``.

    The objective is the mean loss of the last window of steps. ``change`` is its difference from that of the window
    before, as a share of the first step's loss, which is that of the unedited model; it is negative while the loss
    falls. A window is a quarter of the epochs, rounded down, but at least one, so that it has every question equally
    often. A single epoch has no ``change``.
    """
    window = len(losses) // epochs * max(epochs // 4, 1)
    last, before = fmean(losses[-window:]), losses[-2 * window : -window]
    return {"objective": last} | ({"change": (last - fmean(before)) / losses[0]} if before and losses[0] else {})


def _check(model: Model, trainees: Sequence[Trainee], settings: TrainingSettings) -> None:
    rates = [t.learning_rate for t in trainees]
    checks = [
        (settings.reduction in ("sum", "mean"), f"reduction {settings.reduction!r}", "'sum' or 'mean'"),
        (settings.batching in BATCH_SIZES, f"batching {settings.batching!r}", "'question' or 'pair'"),
        (settings.batch_size is None or settings.batch_size >= 1, f"batch_size {settings.batch_size}", "at least 1"),
        (settings.epochs != "auto" and settings.epochs >= 1, f"epochs {settings.epochs}", "a number of at least 1"),
        (all(t.strength > 0 for t in trainees), f"strengths {[t.strength for t in trainees]}", "positive numbers"),
        (all(rate > 0 for rate in rates), f"learning rates {rates}", "positive numbers"),
    ]
    for ok, got, expected in checks:
        if not ok:
            raise ConfigError(got=got, expected=expected, remedy="correct this setting of the method")
    if any(parameter.is_inference() for parameter in model.lm.parameters()):
        raise ModelError(
            got="a model whose weights were created under torch.inference_mode",
            expected="weights that autograd can use in a backward pass",
            remedy="load the model outside of inference_mode",
        )


@dataclass(frozen=True)
class _Item:
    """What a step draws: a question with all its answers or, with ``pair`` batching, with two of them."""

    number: int
    """Number of the tree in the forest whose residual streams are cached."""
    tree: Tree
    pairs: tuple[tuple[int, int], ...]
    """(true, false) pairs of answers, as branch numbers of the tree."""
    reference: Tensor
    """Log-probabilities (answers,) of the tree's answers in the unedited model."""


def _items(data: TrainingData, batching: Batching) -> list[_Item]:
    """One item per question or, with ``pair`` batching, one per pair: a tree of two branches."""
    items = []
    for tree, n_true, reference in zip(data.forest.trees, data.n_true, data.reference, strict=True):
        pairs = [(t, f) for t in range(n_true) for f in range(n_true, len(tree.branches))]
        if batching == "question":
            items.append(_Item(len(items), tree, tuple(pairs), reference))
        else:
            for t, f in pairs:
                pair = replace(tree, branches=(tree.branches[t], tree.branches[f]))
                items.append(_Item(len(items), pair, ((0, 1),), reference[[t, f]]))
    if not items:
        raise DataError(got="no training questions", expected="at least one", remedy="check split.max_train")
    return items


def _order(n: int, size: int, epochs: int, seed: int) -> list[list[int]]:
    """Item numbers of each step; every epoch is shuffled, and its last step may be smaller."""
    rng = random.Random(seed)
    steps = []
    for _ in range(epochs):
        order = list(range(n))
        rng.shuffle(order)
        steps += [order[i : i + size] for i in range(0, n, size)]
    return steps


@dataclass(eq=False)
class _Run:
    """The state of one edit during training."""

    trainee: Trainee
    edit: TrainableEdit
    order: list[list[int]]
    losses: list[float] = field(default_factory=list)
    stopped: str = ""
    """Why it stopped before the last step; empty while it has not."""

    def end_step(self, loss: float, max_grad_norm: float, step: str) -> None:
        """Record the loss and clip the gradient; stop this edit if either is NaN or infinite."""
        if not self.stopped:
            self.losses.append(loss)
            norm = torch.nn.utils.clip_grad_norm_(self.edit.parameters(), max_grad_norm)
            if not (math.isfinite(loss) and bool(norm.isfinite())):
                self.stopped = f"loss {loss:g}, gradient norm {norm.item():g} at {step}"
        if self.stopped:
            for parameter in self.edit.parameters():
                parameter.data.zero_()  # its rows stay in the batch: a zero edit keeps them finite
                parameter.grad = None

    def fit(self, epochs: int) -> Fit:
        """The result: the trained edit and its losses, or why there is none."""
        edit = self.edit.to_edit()
        if not self.stopped and not edit.is_finite:
            self.stopped = "the trained edit is not finite"
        losses = tuple(x for x in self.losses if math.isfinite(x))
        if self.stopped:
            return Fit(None, losses, self.stopped)
        return Fit(edit, losses, facts=progress(losses, epochs))


def _backward(
    model: Model,
    residuals: Residuals,
    drawn: Sequence[Sequence[_Item]],
    runs: Sequence[_Run],
    settings: TrainingSettings,
    limit: int,
) -> list[float]:
    """Run one step forward and backward: each edit's loss (K numbers); gradients add up in the edits' parameters."""
    loss_of = OBJECTIVES[settings.objective].loss
    n_pairs = [sum(len(item.pairs) for item in items) for items in drawn]
    total = torch.zeros(len(runs), device=model.device)
    for part in _parts(drawn, limit):
        margins = _margins(model, residuals, part, [run.edit for run in runs], settings.reduction)
        # A part has only some of an edit's pairs; dividing by all n pairs makes the parts add up to the step's mean.
        shares = [
            loss_of(margin, run.trainee.strength).sum() / n
            for margin, run, n in zip(margins, runs, n_pairs, strict=True)
        ]
        found = torch.stack(shares)  # (K,)
        # A loss that is not finite is left out, so that it does not spoil the gradients of the other edits.
        torch.where(found.isfinite(), found, 0.0).sum().backward()
        total += found.detach().to(total.device)
    return total.tolist()


def _parts(drawn: Sequence[Sequence[_Item]], limit: int) -> list[list[list[_Item]]]:
    """Split a step's items, ``drawn[edit]``, into parts of at most `limit` tokens per edit, or of one item per edit.

    All edits draw equally many items, and each part takes equally many of every edit. With a limit of 160 tokens, an
    edit that draws trees of 100, 50 and 90 tokens has two parts: [100, 50] and [90].
    """
    parts: list[list[list[_Item]]] = []
    held = [0] * len(drawn)
    for row in zip(*drawn, strict=True):  # the next item of every edit
        sizes = [len(item.tree) for item in row]
        if not parts or any(tokens + size > limit for tokens, size in zip(held, sizes, strict=True)):
            parts.append([[] for _ in drawn])
            held = [0] * len(drawn)
        for k, item in enumerate(row):
            parts[-1][k].append(item)
            held[k] += sizes[k]
    return parts


def _margins(
    model: Model,
    residuals: Residuals,
    drawn: Sequence[Sequence[_Item]],
    edits: Sequence[TrainableEdit],
    reduction: Reduction,
) -> list[Float[Tensor, " pairs"]]:
    """The margins h = r(y+) - r(y-) of one part: for each edit a tensor (pairs,), in nats (per token with ``mean``)."""
    bank, prefix_ids = stack_trainable(edits), residuals.forest.prefix
    # Items of one edit share rows; items of different edits never do. `filled` has the items of each row, over all
    # edits; from here on `drawn` has each edit's items in the order in which they stand in its rows.
    packed = [pack([len(item.tree) for item in items], ROW_LENGTH) for items in drawn]
    filled = [[items[i] for i in row] for items, rows in zip(drawn, packed, strict=True) for row in rows]
    drawn = [[items[i] for row in rows for i in row] for items, rows in zip(drawn, packed, strict=True)]
    batch = collate_bank([[item.tree for item in row] for row in filled], 1, len(prefix_ids), model)
    edit_of = torch.tensor([k for k, rows in enumerate(packed) for _ in rows])  # (rows,): such as 0 1 1
    numbers = [[item.number for item in row] for row in filled]
    start = residuals.start(bank.lowest_layer, numbers, batch.input_ids.shape[1])
    prefix = run_prefix(model, prefix_ids, bank, start)  # KV cache for each of the K edits, with gradients
    sums = branch_sums(batch, token_log_probs(model, batch, bank, edit_of, prefix, start))  # (branches,)
    # (branches,), in the same order: by edit, then item, then branch.
    reference = torch.cat([item.reference for items in drawn for item in items]).to(sums.device)
    ratios = log_ratios(sums, reference, batch.lengths.to(sums.device), reduction)  # (branches,)
    margins, first = [], 0  # first: number of the next item's first branch
    for items in drawn:
        true, false = [], []
        for item in items:
            true += [first + t for t, _ in item.pairs]
            false += [first + f for _, f in item.pairs]
            first += len(item.tree.branches)
        margins.append(ratios[true] - ratios[false])
    return margins
