"""Training one optimal edit: ours, and TRL's DPO trainer (IPO) on a PEFT adapter of rank 1, the usual way.

Both train the edit o' = o + <a, o> b with b masked to the location, on the same pairs, in float32 edits. The unedited
model's log-probabilities (and, on our side, its residual streams) are computed before the clock starts. TRL's adapter
holds B = W b, so that it trains b as we do; its end-of-text token is taken off the answers, and its gradient
checkpointing is off, which makes it faster. Each side steps as it does by default: ours on all pairs of 2 questions,
TRL on 4 pairs, each at its own learning rate. TRL takes several times as many steps; what either's were good for, the
loss on held-out questions says, which is reported (``--peer-batch`` gives TRL larger steps).
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import redirect_stdout

import torch

from bench.harness import Options, Outcome, Prepared
from bench.trainers import TAU, adapted_names, make_trainer, mask_adapters, output_weights, pairs, with_reference
from bench.work import load, location, questions
from locaudit.behaviours.format import Prompt
from locaudit.edits import Edit, SiteEdit, stack
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import plant
from locaudit.methods.objectives import pair_loss
from locaudit.methods.parameters import TrainableEdit
from locaudit.methods.training import Job, TrainingData, train

N_HELD_OUT = 12
"""Questions after the trained ones, to measure the loss on."""


def ours(options: Options) -> Prepared:
    """`locaudit.methods.train` on answer trees."""
    model = load(options)
    where = location(options, model)
    data, held_out = (_data(model, part) for part in _parts(options))
    residuals = Residuals(model, data.forest)
    residuals.start(min(layer for layer, _ in where.units), [[0]], 999)  # read before the clock, like the reference
    n_pairs = sum(n * (len(t.branches) - n) for t, n in zip(data.forest.trees, data.n_true, strict=True))

    def run(number: int) -> Outcome:
        job = Job(where, TAU, seed=number + 1)
        (fit,) = train(model, data, [job], objective="ipo", reduction="mean", epochs=1, residuals=residuals)
        run.edit = fit.edit  # type: ignore[attr-defined]
        return Outcome(n_pairs, {"reference_log_probs": torch.cat(data.reference).tolist()})

    def check() -> dict[str, list[float]]:
        sums = [x[0] for x in answer_log_probs(model, held_out.forest, stack(model, [run.edit]))]  # type: ignore[attr-defined]
        return {"held_out_loss": [_held_out_loss(held_out, sums)]}

    return Prepared(run, model.lm, check)


def _parts(options: Options):
    found = questions(options, options.n_questions + N_HELD_OUT)
    return found[: options.n_questions], found[options.n_questions :]


def _data(model, part) -> TrainingData:
    forest = plant(model.tokenizer, Prompt(), [(q.text, q.answers) for q in part])
    reference = tuple(x[0] for x in answer_log_probs(model, forest))
    return TrainingData(forest, tuple(len(q.true) for q in part), reference)


def _held_out_loss(data: TrainingData, sums) -> float:
    """Mean over questions of the mean IPO loss of their pairs, log-ratios per token."""
    losses = []
    for tree, n_true, after, before in zip(data.forest.trees, data.n_true, sums, data.reference, strict=True):
        ratio = (after - before) / torch.tensor([len(branch) for branch in tree.branches])
        losses.append(pair_loss((ratio[:n_true, None] - ratio[n_true:]).flatten(), "ipo", TAU).mean().item())
    return statistics.fmean(losses)


def trl(options: Options) -> Prepared:
    """`trl.DPOTrainer` with ``loss_type="ipo"`` and precomputed reference log-probabilities."""
    model = load(options)
    where = location(options, model)
    train_part, held_out = _parts(options)
    held = _data(model, held_out)  # before PEFT changes the model
    names = adapted_names(model, where)
    weights = output_weights(model, names)
    rows = pairs(train_part)
    folder = tempfile.TemporaryDirectory()
    trainer = make_trainer(model, where, train_part, options, folder.name, seed=0)
    trainer.train_dataset = with_reference(trainer)
    trainer.precompute_ref_logps = True
    reference = trainer.train_dataset.to_list()
    adapters = mask_adapters(trainer, model, names, weights)

    def run(number: int) -> Outcome:
        edit = TrainableEdit(model, where, seed=number + 1)
        for (lora_a, lora_b), a in zip(adapters, edit.a, strict=True):
            lora_a.weight.data.copy_(a.detach().view(1, -1))
            lora_b.parametrizations.weight.original.data.zero_()
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.args.seed = trainer.args.data_seed = number + 1
        with redirect_stdout(None):
            trainer.train()
        found: dict[str, float] = {}
        for row, ref in zip(rows, reference, strict=True):
            for kind in ("chosen", "rejected"):
                found[row["prompt"] + row[kind]] = ref[f"ref_{kind}_logps"]
        return Outcome(
            len(rows),
            {"reference_log_probs": [found[f"Q: {q.text}\nA: {answer}"] for q in train_part for answer in q.answers]},
        )

    def check() -> dict[str, list[float]]:
        sites = {}
        for (site, mask), (lora_a, lora_b) in zip(names.values(), adapters, strict=True):
            b = lora_b.parametrizations.weight.original.detach()[:, 0].cpu() * mask
            sites[site] = SiteEdit(lora_a.weight.detach()[0].float().cpu(), b.float(), 0.0)
        with trainer.model.disable_adapter():
            sums = [x[0] for x in answer_log_probs(model, held.forest, stack(model, [Edit(sites)]))]
        return {"held_out_loss": [_held_out_loss(held, sums)]}

    return Prepared(run, model.lm, check)
