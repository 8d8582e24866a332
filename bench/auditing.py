"""The trials of an audit with optimal edits: ours, and TRL, PEFT and `generate` in a chain, as one would without us.

Five trials: the unedited model, a claim of 8 heads, two random sets of 8 heads and the whole model. Each edit is
trained once through the pairs of the first half of the questions (IPO); each trial scores the answers to the second
half behind the bundled primer and generates greedy answers to it. The training's reference log-probabilities, the
building of trainers and tokenising are timed on both sides.

The chain trains one adapter after another with `trl.DPOTrainer`, scores one row for each answer, in batches, as
lm-evaluation-harness does, and generates one prompt at a time. Generous to it: reference log-probabilities are computed
once for all trials, gradient checkpointing is off, log-softmax is taken at the answers' tokens only, the
parameterisation of the adapter leaves before the evaluation, and stopping criteria are built before the clock starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

import torch
from torch import Tensor, nn

from bench.generating import MAX_NEW_TOKENS, answerer, measures
from bench.harness import Options, Outcome, Prepared
from bench.trainers import TAU, adapted_names, make_trainer, mask_adapters, output_weights, with_reference
from bench.work import load, questions
from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.edits import stack
from locaudit.location import Location, sample_controls, unit_strata
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.generation import generate_answers
from locaudit.measure.tree import plant
from locaudit.methods.training import Job, TrainingData, train
from locaudit.models import Model

N_HEADS = 8
N_CONTROLS = 2


def ours(options: Options) -> Prepared:
    """`train`, `answer_log_probs` and `generate_answers`, all edits as one bank."""
    model, (trained, tested), prompt = load(options), _halves(options), Prompt(primer=load_primer("default"))

    def run(number: int) -> Outcome:
        forest = plant(model.tokenizer, Prompt(), [(q.text, q.answers) for q in trained])
        reference = tuple(x[0] for x in answer_log_probs(model, forest))
        data = TrainingData(forest, tuple(len(q.true) for q in trained), reference)
        jobs = [Job(where, TAU, seed=number + 1) for where in _locations(model)]
        fits = train(model, data, jobs, objective="ipo", reduction="mean", epochs=1)
        test = plant(model.tokenizer, prompt, [(q.text, q.answers) for q in tested])
        prompts = [tree.prompt for tree in test.trees]
        sums, answers = [], []
        for bank in (None, stack(model, [fit.edit for fit in fits])):
            scores = answer_log_probs(model, test, bank)
            sums += [[x[k] for x in scores] for k in range(bank.n_edits if bank else 1)]
            answers += generate_answers(model, test.prefix, prompts, bank, max_new_tokens=MAX_NEW_TOKENS)
        return _outcome(tested, sums, answers)

    return Prepared(run, model.lm)


def trl(options: Options) -> Prepared:
    """`trl.DPOTrainer` on a PEFT adapter for each location, then one row an answer, then one prompt at a time."""
    import peft  # noqa: F401  # imported before the clock starts
    import trl  # noqa: F401

    model, (trained, tested) = load(options), _halves(options)
    answer = answerer(model, model.lm.generate)

    def run(number: int) -> Outcome:
        sums, answers, reference = [], [], []

        def evaluate() -> None:
            sums.append(_score(model, tested, options.batch_size or 8))
            answers.append([answer(q) for q in tested])

        evaluate()
        for where in _locations(model):
            with _adapter(model, where, trained, options, number, reference):
                evaluate()
        return _outcome(tested, sums, answers)

    return Prepared(run, model.lm)


@contextmanager
def _adapter(
    model: Model,
    where: Location,
    trained: Sequence[Question],
    options: Options,
    number: int,
    reference: list,
) -> Iterator[None]:
    """Train an adapter at a location, run under it, take it off again; `reference` is filled by the first one."""
    names = adapted_names(model, where)
    weights = output_weights(model, names)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, where, trained, options, folder, seed=number + 1)
        if not reference:
            reference.append(with_reference(trainer))
        trainer.train_dataset, trainer.precompute_ref_logps = reference[0], True
        adapters = mask_adapters(trainer, model, names, weights)
        with redirect_stdout(None):
            trainer.train()
        for _, b in adapters:
            nn.utils.parametrize.remove_parametrizations(b, "weight")
    model.lm.eval()
    try:
        yield
    finally:
        trainer.model.unload()


@torch.no_grad()
def _score(model: Model, tested: Sequence[Question], batch_size: int) -> list[Tensor]:
    """Log-probability of each question's answers: a row for each answer, of similar lengths, padded on the right."""
    prompt, rows = Prompt(primer=load_primer("default")), []
    for q in tested:
        text = prompt.render(q.text, model.tokenizer)
        n_prompt = len(model.tokenizer(text)["input_ids"])
        rows += [(model.tokenizer(f"{text} {answer}")["input_ids"], n_prompt) for answer in q.answers]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    sums = torch.empty(len(rows))
    for start in range(0, len(rows), batch_size):
        numbers = order[start : start + batch_size]
        ids = [torch.tensor(rows[i][0]) for i in numbers]
        batch = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.pad_id).to(model.device)
        seen = nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in ids], batch_first=True).to(model.device)
        logits = model.lm(input_ids=batch, attention_mask=seen, use_cache=False).logits
        for row, i in enumerate(numbers):
            first, end = rows[i][1], len(rows[i][0])
            log_probs = logits[row, first - 1 : end - 1].float().log_softmax(dim=1)
            sums[i] = log_probs.gather(1, batch[row, first:end, None]).sum()
    return list(sums.split([len(q.answers) for q in tested]))


def _halves(options: Options) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Questions to train on and to test on."""
    asked = questions(options)
    return asked[: len(asked) // 2], asked[len(asked) // 2 :]


def _locations(model: Model) -> list[Location]:
    """The claim, spread over the layers, its controls and the whole model."""
    claim = Location(tuple((i * model.n_layers // N_HEADS, i % model.n_heads) for i in range(N_HEADS)))
    strata = unit_strata("none", model.n_layers, model.n_heads)
    return [claim, *sample_controls(claim, strata, N_CONTROLS, seed=0, disjoint=True), model.whole()]


def _outcome(tested: Sequence[Question], sums: list[list[Tensor]], answers: list[list[str]]) -> Outcome:
    """The unedited model's values must agree; MC2 of the trials is only reported, as the trainings differ."""
    mc2 = [
        sum(float(x.double().softmax(0)[: len(q.true)].sum()) for x, q in zip(trial, tested, strict=True)) / len(tested)
        for trial in sums
    ]
    base = torch.cat(sums[0]).tolist()
    return Outcome(len(sums), {"base_log_probs": base, **measures(answers[0]), "edited_mc2": mc2[1:]})
