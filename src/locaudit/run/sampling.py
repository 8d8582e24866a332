"""How fast this machine does each kind of an audit's work: small samples of it, timed on the real model and data."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from locaudit.behaviours import Question, Split
from locaudit.config import AuditConfig
from locaudit.edits import Edit, EditBank, stack
from locaudit.judges import Billed, Case, Judge
from locaudit.location import Kind, parse_location
from locaudit.measure.activations import Activations, collect_activations
from locaudit.measure.drift import KEEP_BYTES, DriftText, cut_documents, measure_drift, sample_documents
from locaudit.measure.forward import answer_log_probs, run_prefix
from locaudit.measure.generation import BATCH_ROWS, BATCH_TOKENS, generate_answers
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest
from locaudit.methods.iti import iti_edit, iti_theta
from locaudit.methods.parameters import TrainableEdit
from locaudit.methods.probes import fit_logistic
from locaudit.methods.training import Job, TrainingData, train
from locaudit.models import Model
from locaudit.records import TrialSpec
from locaudit.run.paces import Decoding, Paces, lowest_layer, training_banks, training_tokens

LEAST_SECONDS = 1.0
"""A sample is repeated until it has run this long."""
LONG_SECONDS = 4.0
"""A sample whose first, cold run takes longer is not repeated."""
GENERATING_SECONDS = 6.0
"""About how long the sample of generation runs."""
_SCORED_TOKENS = 320
"""Tree tokens of the samples of scoring and training, at least."""
_QUESTIONS = 4
"""Questions, at least, of a sample."""
_DRAWN_TOKENS = 16
"""Tokens of the sample of drawing documents."""
_PROBED_NUMBERS = 2_000_000
"""Features of the units whose probes are fitted."""

T = TypeVar("T")


def measure_paces(
    config: AuditConfig,
    model: Model,
    split: Split,
    forests: Mapping[str, Forest],
    groups: Sequence[Sequence[TrialSpec]],
    judges: Mapping[str, Judge],
    kind: Kind,
    say: Callable[[str], None],
) -> Paces:
    """Time small samples of the work of `groups`, each after a warm-up. Writes nothing and asks no judge by API."""
    say("timing probes")
    asked = _spread(split.train, _QUESTIONS, lambda q: len(q.answers))
    found, seconds = _timed(
        model, lambda: collect_activations(model, asked, context=config.probe.context, kind=kind, seed=config.seed)
    )
    example, fit = seconds / len(found.is_true), _time_probes(config, model, found, split.train)
    theta = iti_theta(found)

    say("timing scores of answers")
    sample = _sample(forests["test"])
    edited = [group for group in groups if group[0].method != "none"]
    bank = _bank(config, model, theta, _typical(edited)) if edited else None
    n_edits = bank.n_edits if bank else 1
    read = _timed(model, lambda: answer_log_probs(model, sample))[1] / sample.n_tokens
    with torch.no_grad():
        prefix, prefix_seconds = _timed(model, lambda: run_prefix(model, sample.prefix, bank))
    residuals = Residuals(model, sample)
    score = _timed(model, lambda: answer_log_probs(model, sample, bank, prefix=prefix, residuals=residuals))[1]

    training: dict[bool, float] = {}
    banks = [part for group in edited for part in training_banks(config, group)]
    for whole in (False, True):
        chosen = [part for part in banks if whole == any(spec.arm in ("whole", "rest") for spec in part)]
        if chosen:
            say(f"timing optimal edits of {'the whole model' if whole else 'a location'}")
            training[whole] = _time_training(config, model, split, forests["train"], _typical(chosen))

    decoding: dict[str, Decoding] = {}
    said: list[tuple[int, str]] = []
    if config.evaluation.max_new_tokens:
        for method in dict.fromkeys(group[0].method for group in edited):
            say(f"timing answers ({method})")
            chosen = _typical([group for group in edited if group[0].method == method])
            decoding[method], answers = _time_answers(
                config, model, forests["test"], _bank(config, model, theta, chosen)
            )
            said += answers

    say("timing drift")
    drift = _time_drift(config, model, bank)
    local = [judge for judge in judges.values() if not isinstance(judge, Billed)]
    judging = (0.0, 0.0, 0.0)
    if local and config.evaluation.max_new_tokens:
        say("timing judges")
        judging = _time_judges(model, local, split.test, said)
    return Paces(
        example,
        fit,
        read,
        prefix_seconds / n_edits if sample.prefix else 0.0,
        score / (sample.n_tokens * n_edits),
        training,
        decoding,
        _batch_rows(config, model, forests["test"]),
        *drift,
        *judging,
    )


def _timed(model: Model, work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and its seconds: the median of its warm runs, or its first one if that was long."""

    def run() -> tuple[T, float]:
        started = time.perf_counter()
        out = work()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return out, time.perf_counter() - started

    out, cold = run()
    if cold > LONG_SECONDS:
        return out, cold
    found = [run()[1]]
    while sum(found) < LEAST_SECONDS and len(found) < 5:
        found.append(run()[1])
    return out, sorted(found)[len(found) // 2]


def _spread(items: Sequence[T], n: int, size: Callable[[T], int]) -> list[T]:
    """About `n` of the items, evenly from small to large: their mean size is about that of all."""
    n = min(n, len(items))
    ordered = sorted(items, key=size)
    return [ordered[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]


def _sample(forest: Forest) -> Forest:
    wanted = max(_QUESTIONS, -(-_SCORED_TOKENS * len(forest.trees) // forest.n_tokens))
    return Forest(forest.prefix, tuple(_spread(forest.trees, wanted, len)))


def _typical(banks: Sequence[Sequence[TrialSpec]]) -> Sequence[TrialSpec]:
    """Of the largest banks, the one whose lowest layer is nearest to the mean: forwards begin there."""
    largest = max(map(len, banks))
    lowest = [(min(map(lowest_layer, bank)), bank) for bank in banks if len(bank) == largest]
    mean = sum(layer for layer, _ in lowest) / len(lowest)
    return min(lowest, key=lambda pair: abs(pair[0] - mean))[1]


def _bank(config: AuditConfig, model: Model, theta: Tensor, specs: Sequence[TrialSpec]) -> EditBank:
    """ITI edits as they are, optimal ones before their first step."""

    def edit(spec: TrialSpec) -> Edit:
        location = parse_location(spec.location)
        if spec.method != "iti":
            return TrainableEdit(model, location, reader=config.optimal.reader, seed=spec.rng_seed).to_edit()
        alpha = spec.hyperparameter or 0.0
        return iti_edit(model, location, theta, alpha=alpha, positions=config.iti.positions)

    return stack(model, [edit(spec) for spec in specs])


def _time_probes(config: AuditConfig, model: Model, found: Activations, train: Sequence[Question]) -> float:
    """Seconds of fitting all probes: some of them, on as many examples as there will be, made from those at hand."""
    x = found.values.flatten(1, 2).transpose(0, 1)
    n_examples = sum(len(question.answers) for question in train)
    n = max(round(n_examples * (1 - config.probe.val_fraction)), 2)
    n_units = max(16, min(_PROBED_NUMBERS // (n * (x.shape[2] + 1)), len(x)))
    x_some, which = x[:: -(-len(x) // n_units)], torch.arange(n) % x.shape[1]
    noise = torch.randn((n, x.shape[2]), generator=torch.Generator().manual_seed(config.seed))
    made = x_some[:, which] * (1 + 0.1 * noise)
    y = found.is_true[which].clone()
    y[0], y[1] = True, False
    seconds = _timed(model, lambda: fit_logistic(made, y, inverse_l2=config.probe.inverse_l2))[1]
    return seconds * len(x) / len(x_some)


def _time_training(config: AuditConfig, model: Model, split: Split, forest: Forest, bank: Sequence[TrialSpec]) -> float:
    """Seconds of a training token for one edit, from one epoch on a few questions."""
    n_true = {tree: len(q.true) for tree, q in zip(forest.trees, split.train, strict=False)}
    sample, settings = _sample(forest), config.optimal
    numbers = [n_true[tree] for tree in sample.trees]
    data = TrainingData(sample, tuple(numbers), tuple(sums[0] for sums in answer_log_probs(model, sample)))
    jobs = [
        Job(parse_location(spec.location), spec.hyperparameter or 0.0, spec.rng_seed, settings.learning_rate)
        for spec in bank
    ]
    residuals = Residuals(model, sample)
    seconds = _timed(
        model,
        lambda: train(
            model,
            data,
            jobs,
            objective=settings.objective,
            reduction=settings.reduction,
            reader=settings.reader,
            batching=settings.batching,
            batch_size=settings.batch_size,
            epochs=1,
            max_grad_norm=settings.max_grad_norm,
            residuals=residuals,
        ),
    )[1]
    return seconds / (training_tokens(config, sample, numbers) * len(jobs))


def _batch_rows(config: AuditConfig, model: Model, forest: Forest) -> int:
    device = "cpu" if model.device.type == "cpu" else "cuda"
    length = sum(len(tree.prompt) for tree in forest.trees) / len(forest.trees)
    length += len(forest.prefix) + config.evaluation.max_new_tokens
    return max(min(BATCH_ROWS[device], int(BATCH_TOKENS[device] / length)), 1)


def _time_answers(
    config: AuditConfig, model: Model, forest: Forest, bank: EditBank
) -> tuple[Decoding, list[tuple[int, str]]]:
    """The pace of decoding, and (number of the test question, answer) of what was said."""
    with torch.no_grad():
        prefix = run_prefix(model, forest.prefix, bank)
    full = max(_batch_rows(config, model, forest) // bank.n_edits, 1)
    prompts = [tree.prompt for tree in forest.trees[:full]]
    limit = config.evaluation.max_new_tokens

    def generate(n: int) -> tuple[list[list[str]], float]:
        started = time.perf_counter()
        out = generate_answers(model, forest.prefix, prompts[:n], bank, max_new_tokens=limit, cached_prefix=prefix)
        return out, time.perf_counter() - started

    generate_answers(model, forest.prefix, prompts[:2], bank, max_new_tokens=2, cached_prefix=prefix)
    few = min(4, len(prompts))
    said, first = generate(few)
    many = min(len(prompts), max(few, int(few * GENERATING_SECONDS / max(first, 1e-6))))
    if many == few:
        pace = Decoding(0.0, first / (few * bank.n_edits))
    else:
        said, second = generate(many)
        # More rows never cost less, nor more than in proportion.
        row = min(max(second - first, 0.0) / (many - few), second / many)
        pace = Decoding(second - many * row, row / bank.n_edits)
    return pace, [(i, answer) for answers in said for i, answer in enumerate(answers)]


def _time_drift(config: AuditConfig, model: Model, bank: EditBank | None) -> tuple[float, float, float, bool]:
    """`Paces.drift_sampling`, `drift`, `drift_base` and `drift_kept`."""
    settings, sampling = config.evaluation, 0.0
    n_documents, n_tokens = settings.drift_documents, settings.drift_tokens
    if settings.drift_text is not None:
        documents = cut_documents(model, settings.drift_text, n_documents, n_tokens)
    else:
        n_drawn = min(_DRAWN_TOKENS, n_tokens)
        drawn, seconds = _timed(model, lambda: sample_documents(model, n_documents, n_drawn, config.seed))
        sampling = seconds * n_tokens / n_drawn
        documents = drawn.repeat(1, -(-n_tokens // n_drawn))[:, :n_tokens]
    some = documents[: max(1, min(n_documents, 512 // n_tokens))].contiguous()
    text = DriftText(some)
    vocabulary = text.base_log_probs(model, 0, 1).shape[-1]
    kept = 4 * documents.numel() * vocabulary <= KEEP_BYTES
    base = _timed(model, lambda: measure_drift(model, DriftText(some), None))[1] / len(some)
    text = DriftText(some)
    edited = _timed(model, lambda: measure_drift(model, text, bank))[1] / len(some)
    return sampling, edited / (bank.n_edits if bank else 1), base, kept


def _time_judges(
    model: Model, judges: Sequence[Judge], test: Sequence[Question], said: Sequence[tuple[int, str]]
) -> tuple[float, float, float]:
    """`Paces.judge_loading`, `judge` and `judge_question`."""

    def seconds(cases: Sequence[tuple[int, str]]) -> float:
        started = time.perf_counter()
        for judge in judges:
            judge.score([Case(test[i].text, answer, test[i].true, test[i].false) for i, answer in cases])
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - started

    cold = seconds([(len(test) - 1, test[-1].true[0])])
    numbers = range(min(len(test) - 1, 4))
    first = seconds([(i, test[i].true[0]) for i in numbers])
    # Answers that no judge has seen: what the edited models said, or else the false references.
    new = [(i, answer) for i in numbers for answer in test[i].false]
    new += [(i, answer) for i, answer in said if i in numbers and answer not in (*test[i].answers,)]
    answer = seconds(list(dict.fromkeys(new))) / len(set(new))
    question = max(first / len(numbers) - answer, 0.0)
    return max(cold - answer - question, 0.0), answer, question
