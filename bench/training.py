"""Speed of training one optimal edit: locaudit, against TRL's DPO trainer (IPO) on a rank-1 PEFT adapter.

Both sides train the edit h' = h + <a, h> b, with b masked to the location, on the same pairs, in float32. The unedited
model's log-probabilities and, on our side, its residual streams are computed before the clock starts. TRL's adapter is
parametrised as B = W b, so that it trains b as we do. Its end-of-text token is removed from the answers, and gradient
checkpointing is off, which makes it faster.

Each side uses its default batches, all pairs of 2 questions for ours and 4 pairs for TRL, and its own learning rate.
TRL takes several times as many steps (``--peer-batch`` gives it larger batches). The loss on held-out questions is
reported to show how well each side trained.
"""

from __future__ import annotations

import tempfile
from contextlib import redirect_stdout

from torch import Tensor

from bench.harness import Options, Outcome, Prepared, Task
from bench.trainers import make_trainer, pairs
from bench.work import (
    TAU,
    Job,
    Model,
    TrainableEdit,
    TrainingData,
    held_out_loss,
    location,
    log_probs,
    questions,
    rank_one,
    read_ahead,
    train,
    training_data,
)

N_HELD_OUT = 12
"""Number of held-out questions, which follow the training questions."""


def ours(options: Options) -> Prepared:
    """`locaudit.methods.train` on answer trees."""
    model, trained = options.load()
    where, held = location(model, options.where), _held_out(options, model, len(trained))
    data = training_data(model, trained)
    residuals = read_ahead(model, data, where)
    edits = []

    def run(number: int) -> Outcome:
        job = Job(where, TAU, seed=number + 1)
        (fit,) = train(model, data, [job], objective="ipo", reduction="mean", epochs=1, residuals=residuals)
        edits[:] = [fit.edit]
        return Outcome(
            len(pairs(trained)), {"reference_log_probs": [x for row in data.reference for x in row.tolist()]}
        )

    def check() -> dict[str, list[float]]:
        return _loss(held, log_probs(model, held.forest, edits)[0])

    return Prepared(run, model.lm, check)


def trl(options: Options) -> Prepared:
    """`trl.DPOTrainer` with ``loss_type="ipo"`` and precomputed reference log-probabilities."""
    model, trained = options.load()
    where, held = (
        location(model, options.where),
        _held_out(options, model, len(trained)),
    )  # before PEFT changes the model
    folder = tempfile.TemporaryDirectory()
    trainer, adapters = make_trainer(model, where, trained, options, folder.name)
    found: dict[str, float] = {}
    for row, ref in zip(pairs(trained), trainer.train_dataset.to_list(), strict=True):
        for kind in ("chosen", "rejected"):
            found[row["prompt"] + row[kind]] = ref[f"ref_{kind}_logps"]
    reference = [found[f"Q: {q.text}\nA: {answer}"] for q in trained for answer in q.answers]

    def run(number: int, folder=folder) -> Outcome:  # the folder lives as long as the function
        start = TrainableEdit(model, where, seed=number + 1)
        for adapter, a in zip(adapters, start.a, strict=True):
            adapter.a.weight.data.copy_(a.detach().view(1, -1))
            adapter.b.parametrizations.weight.original.data.zero_()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.args.seed = trainer.args.data_seed = number + 1
        with redirect_stdout(None):
            trainer.train()
        return Outcome(len(pairs(trained)), {"reference_log_probs": reference})

    def check() -> dict[str, list[float]]:
        sites = {}
        for x in adapters:
            b = x.b.parametrizations.weight.original.detach()[:, 0].cpu() * x.mask
            sites[x.site] = x.a.weight.detach()[0].float().cpu(), b.float()
        with trainer.model.disable_adapter():
            sums = log_probs(model, held.forest, [rank_one(sites)])[0]
        return _loss(held, sums)

    return Prepared(run, model.lm, check)


def _held_out(options: Options, model: Model, n: int) -> TrainingData:
    """The questions after the first n, with the unedited model's log-probabilities."""
    return training_data(model, questions(options.subject, n + N_HELD_OUT)[n:])


def _loss(held: TrainingData, sums: list[Tensor]) -> dict[str, list[float]]:
    return {"held_out_loss": [held_out_loss(held, sums, per_token=True)]}


TASK = Task(
    "training",
    "pairs",
    {"ours": ours, "trl": trl},
    tolerances={"reference_log_probs": 2e-3},
    bars={("cpu", "all"): 15, ("cpu", "middle"): 25, ("cuda", "all"): 20, ("cuda", "middle"): 40},
)
