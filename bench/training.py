"""Training one optimal edit: ours, and TRL's DPO trainer (IPO) on a PEFT adapter of rank 1, the usual way.

Both train the edit h' = h + <a, h> b with b masked to the location, on the same pairs, in float32 edits. The unedited
model's log-probabilities (and, on our side, its residual streams) are computed before the clock starts. TRL's adapter
holds B = W b, so that it trains b as we do; its end-of-text token is taken off the answers, and its gradient
checkpointing is off, which makes it faster. Each side steps as it does by default: ours on all pairs of 2 questions,
TRL on 4 pairs, each at its own learning rate. TRL takes several times as many steps; what either's were good for, the
loss on held-out questions says, which is reported (``--peer-batch`` gives TRL larger steps).
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
"""Questions after the trained ones, to measure the loss on."""


def ours(options: Options) -> Prepared:
    """`locaudit.methods.train` on answer trees."""
    model, trained = options.load()
    where, held = location(model, options.where), _held_out(options, model)
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
    where, held = location(model, options.where), _held_out(options, model)  # before PEFT changes the model
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


def _held_out(options: Options, model: Model) -> TrainingData:
    """Questions to measure the loss on, with the unedited model's log-probabilities."""
    n = options.questions
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
