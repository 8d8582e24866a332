"""Speed of a small audit with optimal edits: locaudit, against TRL, PEFT and `generate` chained by hand.

There are five trials: the unedited model, a claim of 8 heads, two random sets of 8 heads, and the whole model. Each
edit is trained for one epoch (IPO) on the pairs of the first half of the questions. Each trial then scores the answers
to the second half after the bundled primer, and generates greedy answers to these questions. Reference
log-probabilities, building trainers and tokenising are timed on both sides.

The chain trains one adapter after another with `trl.DPOTrainer`, scores one row per answer in batches, as
lm-evaluation-harness does, and generates one prompt at a time. It gets these advantages. Reference log-probabilities
are computed once for all trials, and gradient checkpointing is off. Log-softmax is taken at the answers' tokens only,
and the adapter's parametrisation is removed before the evaluation. Stopping criteria are built before the clock starts.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

from bench.generating import MAX_NEW_TOKENS, answerer, measures
from bench.harness import Options, Outcome, Prepared, Task
from bench.trainers import make_trainer
from bench.work import (
    PRIMED,
    TAU,
    Job,
    Location,
    Model,
    Question,
    generate,
    grow,
    log_probs,
    random_units,
    score_questions,
    train,
    training_data,
)

N_HEADS = 8
N_CONTROLS = 2


def ours(options: Options) -> Prepared:
    """`train`, `answer_log_probs` and `generate_answers`; all edits train and generate in one bank."""
    model, asked = options.load()
    trained, tested = _halves(asked)

    def run(number: int) -> Outcome:
        jobs = [Job(where, TAU, seed=number + 1) for where in _locations(model)]
        data = training_data(model, trained)
        edits = [f.edit for f in train(model, data, jobs, objective="ipo", reduction="mean", epochs=1)]
        forest = grow(model, tested, PRIMED)
        sums = log_probs(model, forest) + log_probs(model, forest, edits)
        answers = [said for bank in (None, edits) for said in generate(model, forest, bank, MAX_NEW_TOKENS)]
        return _outcome(tested, sums, answers)

    return Prepared(run, model.lm)


def trl(options: Options) -> Prepared:
    """`trl.DPOTrainer` on one PEFT adapter per location, then one row per answer, then one prompt at a time."""
    import peft  # noqa: F401  # imported before the clock starts
    import trl  # noqa: F401

    model, asked = options.load()
    trained, tested = _halves(asked)
    answer = answerer(model)

    def run(number: int) -> Outcome:
        sums, answers, reference = [], [], None

        def evaluate() -> None:
            sums.append(_score(model, tested, options.peer_batch or 8))
            answers.append(answer(tested))

        evaluate()
        for where in _locations(model):
            with tempfile.TemporaryDirectory() as folder:
                trainer, adapters = make_trainer(model, where, trained, options, folder, number + 1, reference)
                reference = trainer.train_dataset  # the same for all locations
                with redirect_stdout(None):
                    trainer.train()
            for adapter in adapters:
                nn.utils.parametrize.remove_parametrizations(adapter.b, "weight")
            model.lm.eval()
            evaluate()
            trainer.model.unload()
        return _outcome(tested, sums, answers)

    return Prepared(run, model.lm)


@torch.no_grad()
def _score(model: Model, tested: Sequence[Question], batch_size: int) -> list[Tensor]:
    """Summed log-probability of each answer, [question] -> (answers,): one row per answer, padded on the right."""
    tokenizer, rows = model.tokenizer, []
    for q in tested:
        text = PRIMED.render(q.text, tokenizer)
        n_prompt = len(tokenizer(text)["input_ids"])
        rows += [(f"{text} {answer}", n_prompt) for answer in q.answers]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # rows of similar length share a batch
    sums = torch.empty(len(rows))
    for start in range(0, len(rows), batch_size):
        numbers = order[start : start + batch_size]
        texts = [rows[i][0] for i in numbers]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]  # (rows, tokens)
        logits = model.lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(numbers):
            first, end = rows[i][1], int(mask[row].sum())
            said = logits[row, first - 1 : end - 1].float().log_softmax(dim=1)  # (answer's tokens, vocabulary)
            sums[i] = said.gather(1, ids[row, first:end, None]).sum()
    return list(sums.split([len(q.answers) for q in tested]))


def _halves(asked: Sequence[Question]) -> tuple[Sequence[Question], Sequence[Question]]:
    """Questions to train on and to test on."""
    return asked[: len(asked) // 2], asked[len(asked) // 2 :]


def _locations(model: Model) -> list[Location]:
    """The claim (heads spread over the layers), its controls, and the whole model."""
    claim = Location(tuple((i * model.n_layers // N_HEADS, i % model.n_heads) for i in range(N_HEADS)))
    return [claim, *(random_units(model, "head", N_HEADS, seed) for seed in range(N_CONTROLS)), Location.whole()]


def _outcome(tested: Sequence[Question], sums: list[list[Tensor]], answers: list[list[str]]) -> Outcome:
    """The unedited model's values must agree. MC2 of the edits is only reported, because training differs."""
    mc2 = [statistics.fmean(score_questions(tuple(tested), trial, sums[0])["mc2"]) for trial in sums]
    base = torch.cat(sums[0]).tolist()
    return Outcome(len(sums), {"base_log_probs": base, **measures(answers[0]), "edited_mc2": mc2[1:]})


TASK = Task(
    "auditing",
    "trials",
    {"ours": ours, "trl": trl},
    tolerances={"base_log_probs": 2e-3, "length": 0.0, "letters": 0.0},
)
