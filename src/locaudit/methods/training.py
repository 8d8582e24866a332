"""One training loop for K edits: each step, every edit gets its own batch as rows of one forward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
"""Questions, or pairs (the paper's), a step."""

PART_TOKENS = {"cpu": 160, "cuda": 16384}
"""Tokens of an edit that run forward and backward at once, by device: more take more memory, and hardly less time a
token."""


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

    def first(self, n: int | None) -> TrainingData:
        """The first `n` questions (None: all)."""
        if n is None or n >= len(self.forest.trees):
            return self
        return TrainingData(Forest(self.forest.prefix, self.forest.trees[:n]), self.n_true[:n], self.reference[:n])


@dataclass(frozen=True)
class Trainee:
    """One edit to train."""

    start: Callable[[], TrainableEdit]
    """The edit before its first step."""
    strength: float
    """Of the objective: tau of IPO, beta of DPO."""
    seed: int
    """Of the order of questions."""
    learning_rate: float


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
    """Train edits as rows of one batch; they do not influence each other.

    Per step and edit the loss is the mean of the objective over the pairs of its batch: all true-false pairs of
    `batch_size` questions, from their trees (``question``), or `batch_size` single pairs (``pair``, the paper). AdamW
    without weight decay (`optimizer` may name its paged form), cosine schedule to 0 without warm-up, gradients clipped
    to `max_grad_norm` for each edit (transformers' Trainer does so by default). Every edit sees every question or pair
    `epochs` times, in an order of its own seed. An edit whose loss or gradient is not finite stops, alone.

    Weights are frozen, so gradients stop at the lowest edited layer, and forwards start there from residual streams
    read once; `residuals` keeps those of ``data.forest`` for other calls. A step of more than `step_tokens` tokens an
    edit (None: `PART_TOKENS`) runs in parts, whose gradients add up: the same step in less memory.

    `on_step` is called with (steps done, steps in all).
    """
    _check(model, trainees, settings)
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
        drawn = [[items[i] for i in run.order[step]] for run in runs]
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
    return [run.fit() for run in runs]


def _check(model: Model, trainees: Sequence[Trainee], settings: TrainingSettings) -> None:
    rates = [t.learning_rate for t in trainees]
    checks = [
        (settings.reduction in ("sum", "mean"), f"reduction {settings.reduction!r}", "'sum' or 'mean'"),
        (settings.batching in BATCH_SIZES, f"batching {settings.batching!r}", "'question' or 'pair'"),
        (settings.batch_size is None or settings.batch_size >= 1, f"batch_size {settings.batch_size}", "at least 1"),
        (settings.epochs >= 1, f"epochs {settings.epochs}", "at least 1"),
        (all(t.strength > 0 for t in trainees), f"strengths {[t.strength for t in trainees]}", "positive numbers"),
        (all(rate > 0 for rate in rates), f"learning rates {rates}", "positive numbers"),
    ]
    for ok, got, expected in checks:
        if not ok:
            raise ConfigError(got=got, expected=expected, remedy="change the argument")
    if any(parameter.is_inference() for parameter in model.lm.parameters()):
        raise ModelError(
            got="a model whose weights were made under torch.inference_mode",
            expected="weights that a backward pass may use",
            remedy="load the model outside of inference_mode",
        )


@dataclass(frozen=True)
class _Item:
    """What a step draws: a tree, its pairs as branch numbers, and its reference scores."""

    number: int
    """Of its tree among all items'."""
    tree: Tree
    pairs: tuple[tuple[int, int], ...]
    reference: Tensor


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


@dataclass(eq=False)
class _Run:
    """An edit on its way through the steps."""

    trainee: Trainee
    edit: TrainableEdit
    order: list[list[int]]
    losses: list[float] = field(default_factory=list)
    stopped: str = ""
    """Why it stopped before the last step."""

    def end_step(self, loss: float, max_grad_norm: float, step: str) -> None:
        """Clip the gradient; stop at a number that is not finite."""
        if not self.stopped:
            self.losses.append(loss)
            norm = torch.nn.utils.clip_grad_norm_(self.edit.parameters(), max_grad_norm)
            if not (math.isfinite(loss) and bool(norm.isfinite())):
                self.stopped = f"loss {loss:g}, gradient norm {norm.item():g} at {step}"
        if self.stopped:
            for parameter in self.edit.parameters():
                parameter.data.zero_()  # its rows stay in the batch, and finite
                parameter.grad = None

    def fit(self) -> Fit:
        edit = self.edit.to_edit()
        if not self.stopped and not edit.is_finite:
            self.stopped = "the trained edit is not finite"
        return Fit(None if self.stopped else edit, tuple(x for x in self.losses if math.isfinite(x)), self.stopped)


def _backward(
    model: Model,
    residuals: Residuals,
    drawn: Sequence[Sequence[_Item]],
    runs: Sequence[_Run],
    settings: TrainingSettings,
    limit: int,
) -> list[float]:
    """Each edit's loss on the items of its step, `drawn`; gradients of all parts add up in the edits."""
    loss_of = OBJECTIVES[settings.objective].loss
    n_pairs = [sum(len(item.pairs) for item in items) for items in drawn]
    total = torch.zeros(len(runs), device=model.device)
    for part in _parts(drawn, limit):
        margins = _margins(model, residuals, part, [run.edit for run in runs], settings.reduction)
        shares = [
            loss_of(margin, run.trainee.strength).sum() / n
            for margin, run, n in zip(margins, runs, n_pairs, strict=True)
        ]
        found = torch.stack(shares)  # (K,)
        torch.where(found.isfinite(), found, 0.0).sum().backward()
        total += found.detach().to(total.device)
    return total.tolist()


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


def _margins(
    model: Model,
    residuals: Residuals,
    drawn: Sequence[Sequence[_Item]],
    edits: Sequence[TrainableEdit],
    reduction: Reduction,
) -> list[Float[Tensor, " pairs"]]:
    """The margin r(y+) - r(y-) of each pair of each edit's items."""
    bank, prefix_ids = stack_trainable(edits), residuals.forest.prefix
    # An edit's items share rows; from here on they stand in the order of the rows.
    packed = [pack([len(item.tree) for item in items], ROW_LENGTH) for items in drawn]
    filled = [[items[i] for i in row] for items, rows in zip(drawn, packed, strict=True) for row in rows]
    drawn = [[items[i] for row in rows for i in row] for items, rows in zip(drawn, packed, strict=True)]
    batch = collate_bank([[item.tree for item in row] for row in filled], 1, len(prefix_ids), model)
    edit_of = torch.tensor([k for k, rows in enumerate(packed) for _ in rows])  # (rows,)
    numbers = [[item.number for item in row] for row in filled]
    start = residuals.start(bank.lowest_layer, numbers, batch.input_ids.shape[1])
    prefix = run_prefix(model, prefix_ids, bank, start)
    sums = branch_sums(batch, token_log_probs(model, batch, bank, edit_of, prefix, start))  # (branches,)
    reference = torch.cat([item.reference for items in drawn for item in items]).to(sums.device)
    ratios = log_ratios(sums, reference, batch.lengths.to(sums.device), reduction)
    margins, first = [], 0
    for items in drawn:
        true, false = [], []
        for item in items:
            true += [first + t for t, _ in item.pairs]
            false += [first + f for _, f in item.pairs]
            first += len(item.tree.branches)
        margins.append(ratios[true] - ratios[false])
    return margins
