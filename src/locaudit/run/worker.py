"""Fit and score groups of trials. Results depend neither on a clock nor on global random state.

    Worker(shared).run(group)  ->  (record, edit) pairs

A worker can be built on any machine from the run folder (settings and prepared tensors) and from the model and data
that the settings name. Only the driver (`locaudit.run.audit`) writes to the run folder.

Edits run in banks: K edits in one batch (`locaudit.edits.bank`). Trained methods fit one bank of ``bank_size`` edits at
a time; then all edits of the group are scored as one bank. The bank size changes results only by rounding errors.

A trial that is partly measured, for example because test questions were added, is *kept*: its edit is loaded from the
run folder, and only the missing questions and answers are measured.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from locaudit.behaviours.behaviour import Question
from locaudit.behaviours.format import Prompt
from locaudit.claims.directions import VECTORS
from locaudit.config import AuditConfig
from locaudit.edits.bank import EditBank, stack
from locaudit.edits.edit import Edit, load_edit
from locaudit.errors import ModelError
from locaudit.measure.answers import answer_prompts
from locaudit.measure.drift import DriftText, measure_drift
from locaudit.measure.forward import ROW_TOKENS, Prefix, answer_log_probs, run_prefix
from locaudit.measure.multiple_choice import score_prompts, score_questions
from locaudit.measure.residual import Residuals
from locaudit.measure.tree import Forest
from locaudit.methods.base import Fit, Job
from locaudit.methods.training import TrainingData
from locaudit.models.memory import is_out_of_memory, of_device, release
from locaudit.models.model import Model
from locaudit.records import NO_METHOD, OFF, TrialRecord, TrialSpec, mean_metrics
from locaudit.registry import METHODS
from locaudit.stats.scores import RELATED
from locaudit.store.cache import Cache
from locaudit.store.database import Kept, join
from locaudit.text import plural

NOT_FINITE = "scores under the edit are not finite"
LEAST_ROW_TOKENS = 64
"""Padded tokens per forward below which batches are not halved again: the device is too small."""
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The questions of one held-out split, with the unedited model's answer log-probabilities."""

    questions: tuple[Question, ...]
    forest: Forest
    """The same questions as trees of token ids."""
    reference: tuple[Tensor, ...]
    """For each question, the unedited model's log-probability of each answer: (answers,)."""
    keys: tuple[str, ...] = ()
    """For each question, the key under which the database stores its scores (`locaudit.store.database`). Other prompts
    of a question have its key."""

    def only(self, keys: frozenset[str]) -> HeldOut:
        """The questions whose key is in `keys`."""
        chosen = [i for i, key in enumerate(self.keys) if key in keys]
        return HeldOut(
            tuple(self.questions[i] for i in chosen),
            Forest(self.forest.prefix, tuple(self.forest.trees[i] for i in chosen)),
            tuple(self.reference[i] for i in chosen),
            tuple(self.keys[i] for i in chosen),
        )


@dataclass(frozen=True, eq=False)
class Exchanged:
    """What a placebo is fitted with instead of `Shared.training` and `Shared.prepared` (`locaudit.run.placebos`)."""

    training: TrainingData
    prepared: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Shared:
    """What all trials of an audit share. A trial's result depends only on this and on its `TrialSpec`."""

    model: Model
    config: AuditConfig
    training: TrainingData
    splits: Mapping[str, HeldOut]
    """``val``, ``test``, ``off:NAME``, and ``paraphrases:val`` and the like (`RELATED`)."""
    drift: DriftText | None
    """Documents for measuring drift; None if drift is not to be measured again."""
    cache: Cache
    """Answers generated earlier, in any run of this user."""
    answer_format: Prompt
    """Prompt format; it determines where a generated answer ends."""
    prepared: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Method -> tensors that all its edits use (`locaudit.methods.Method.prepare`)."""
    row_tokens: int | None = None
    """Padded tokens per forward; None for the device's default. Halved when the device runs out of memory."""
    fitted: dict[str, Fit] = field(default_factory=dict)
    """Trial id -> its edit, until it is scored. If scoring runs out of memory, the edit need not be fitted again."""
    placebos: tuple[Exchanged, ...] = ()
    """What is exchanged for each placebo, by number."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """Trial id -> what is stored of a partly measured trial: its edit exists, some scores or answers do not."""
    edits: Path = Path()
    """Folder of the saved edits."""
    clock: Counter[str] = field(default_factory=Counter)
    """Part of the work -> seconds, of the trials that run now (`TrialRecord.seconds`)."""
    parts: dict[frozenset[str], Shared] = field(default_factory=dict)
    """Results of `only`, so that each subset of questions and its residual streams are built once."""
    vectors: Mapping[str, NDArray] = field(default_factory=dict)
    """Vectors of claim and controls by hash, if these are directions (`locaudit.claims.directions`)."""

    def __post_init__(self):
        VECTORS.update(self.vectors)  # a worker in another process does not know them yet

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds spent inside to the clock."""
        started = time.monotonic()
        yield
        self.clock[part] += time.monotonic() - started  # type: ignore[assignment]

    def only(self, keys: frozenset[str]) -> Shared:
        """A copy restricted to the held-out questions in `keys`, for measuring what partly measured trials lack."""
        if keys not in self.parts:
            splits = {name: held.only(keys) for name, held in self.splits.items()}
            splits = {name: held for name, held in splits.items() if held.keys}
            # Drift was measured when the edit was first scored, and does not depend on the questions.
            self.parts[keys] = replace(self, splits=splits, drift=None, parts={})
        return self.parts[keys]

    def for_placebo(self, number: int) -> Shared:
        """A copy to fit placebo `number` with."""
        data = self.placebos[number]
        return replace(self, training=data.training, prepared=data.prepared, parts={})

    @cached_property
    def residuals(self) -> dict[str, Residuals]:
        """Residual streams of the unedited model on ``train``, ``val`` and ``test``, computed when first needed."""
        forests = {"train": self.training.forest} | {name: held.forest for name, held in self.splits.items()}
        return {name: Residuals(self.model, forest) for name, forest in forests.items()}


Said = Mapping[str, tuple[tuple[str, ...], ...]]
"""Split -> for each sample, the answers to its questions."""
Result = tuple[TrialRecord, Edit | None]
"""A trial's record, and its edit if that is to be saved (None: unedited model, diverged, or saved already)."""


class Worker:
    """Runs groups of trials. If memory runs out, it tries again with fewer edits at once, then with smaller batches.

    `work` does something else with a group instead of `run_trials`.
    """

    def __init__(self, shared: Shared, say: Callable[[str], None] = lambda _: None, work: Any = None):
        self.shared, self.say, self._work = shared, say, work
        self._most: dict[str, int] = {}
        """Method -> largest number of edits at once that fits in memory, once a larger one did not."""

    def run(self, group: Sequence[TrialSpec], on_step: OnStep | None = None) -> Iterator[list[Result]]:
        """Yield the results of the group's trials, in order, in one or several parts.

        Raises `ModelError` if even one edit with the smallest batch does not fit. Parts yielded before stay valid.
        """
        method = group[0].method
        size = min(self._most.get(method, len(group)), len(group))
        start = 0
        while start < len(group):
            part = group[start : start + size]
            results = self._try(part, on_step)
            if results is not None:
                yield results
                start += len(part)
            elif len(part) > 1:
                size = self._most[method] = len(part) // 2
                self.say(f"out of memory with {plural(len(part), 'edit')} at once: going on with {size}")
            else:
                self._shorten(part)

    def _try(self, part: Sequence[TrialSpec], on_step: OnStep | None) -> list[Result] | None:
        """The results, or None if memory ran out."""
        try:
            return (self._work or run_trials)(self.shared, part, on_step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Memory is released here and not in the except clause, because there the error's traceback still refers to the
        # tensors that did not fit.
        vars(self.shared).pop("residuals", None)
        self.shared.parts.clear()
        release(self.shared.model.device)
        return None

    def _shorten(self, part: Sequence[TrialSpec]) -> None:
        tokens = self.shared.row_tokens or of_device(ROW_TOKENS, self.shared.model.device)
        if tokens // 2 < LEAST_ROW_TOKENS:
            raise ModelError(
                got=f"a device without memory for one edit and {tokens} tokens at once ({part[0].method} at the "
                f"{part[0].arm})",
                expected="memory for the model and a training step",
                remedy="free memory or choose another loading.device, and run the same command again (finished trials "
                "are kept); or use a new --out with loading.dtype bfloat16 or a smaller batch_size of the method",
            )
        self.shared = replace(self.shared, row_tokens=tokens // 2)
        self.say(f"out of memory with one edit: going on with {tokens // 2} tokens at once")


def scored_splits(config: AuditConfig, spec: TrialSpec) -> tuple[str, ...]:
    """The splits that a trial is scored on. Validation is needed only if its method has several strengths."""
    off = [f"{OFF}{name}" for name in config.off_target]
    if spec.method != NO_METHOD and len(METHODS[spec.method].strengths(config.methods[spec.method])) == 1:
        return ("test", *off)
    return ("val", "test", *off)


def run_splits(shared: Shared, spec: TrialSpec) -> list[str]:
    """The splits of `scored_splits` that are there, and other prompts of their questions."""
    scored = scored_splits(shared.config, spec)
    return [name for name in shared.splits if name in scored or name.rpartition(":")[2] in scored]


Lack = tuple[frozenset[str], frozenset[tuple[str, int]]]
"""What a trial still needs: keys of the questions to score, and (key, number of the sample) of the answers."""


def find_lack(shared: Shared, spec: TrialSpec) -> Lack:
    """What is still to be measured for a trial: everything, or what a partly measured trial lacks."""
    evaluation = shared.config.evaluation
    if spec.measured is not None:
        first = 1 + len(spec.measured.samples.get("test", ()))
        more = product(shared.splits["test"].keys, range(first, 1 + evaluation.samples))
        return frozenset(), frozenset(more)
    names, kept = scored_splits(shared.config, spec), shared.kept.get(spec.trial_id)
    keys = frozenset(key for name in names for key in shared.splits[name].keys)
    spoken = [key for name in names if not name.startswith(OFF) for key in shared.splits[name].keys]
    asked = frozenset(product(spoken, evaluation.first_samples))
    return (keys, asked) if kept is None else (keys.difference(kept.scores), asked.difference(kept.answers))


def run_trials(shared: Shared, specs: Sequence[TrialSpec], on_step: OnStep | None = None) -> list[Result]:
    """Fit and score trials; returns their results in the order of `specs`.

    For partly measured trials, the saved edit is loaded and only what is missing is measured.
    """
    # One bank scores the same questions under all its edits, so partly measured trials are grouped by what they lack.
    # None stands for trials that are not measured at all and still have to be fitted.
    shared.clock.clear()
    alike: dict[tuple[str, Lack | None], list[TrialSpec]] = {}
    for spec in specs:
        is_new = spec.measured is None and spec.trial_id not in shared.kept
        alike.setdefault((spec.method, None if is_new else find_lack(shared, spec)), []).append(spec)
    found: dict[str, Result] = {}
    for (_, lack), part in alike.items():
        if lack is None:
            results = _run_new(shared, part, on_step)
        elif part[0].measured is None:
            results = _run_kept(shared, part, *lack)
        else:
            results = _run_more(shared, part, sorted({sample for _, sample in lack[1]}))
        found |= {record.spec.trial_id: (record, edit) for record, edit in results}
    seconds = {part: total / len(specs) for part, total in shared.clock.items()}
    return [(replace(record, seconds=seconds), edit) for record, edit in (found[spec.trial_id] for spec in specs)]


def _run_more(shared: Shared, specs: Sequence[TrialSpec], samples: Sequence[int]) -> list[Result]:
    """Sample further answers to the test questions with saved edits, and return complete records."""
    records = [spec.measured for spec in specs if spec.measured]
    edits = None if specs[0].method == NO_METHOD else [load_edit(shared.edits / record.edit) for record in records]
    return [
        (replace(record, samples={**record.samples, "test": record.samples.get("test", ()) + said["test"]}), None)
        for record, said in zip(records, _answers(shared, ("test",), edits, {}, samples), strict=True)
    ]


def _run_kept(
    shared: Shared, specs: Sequence[TrialSpec], unscored: frozenset[str], unanswered: frozenset[tuple[str, int]]
) -> list[Result]:
    """Measure saved edits on the questions that they lack, and return complete records.

    All `specs` lack the same: scores on the questions `unscored`, and the answers `unanswered`.
    """
    parts = [shared.kept[spec.trial_id] for spec in specs]
    # Scoring also generates answers. What remains are questions that have scores but not all answers, as in a run that
    # generated nothing at first, or no samples.
    lacks: dict[str, list[int]] = defaultdict(list)
    for key, sample in sorted(unanswered):
        if key not in unscored:
            lacks[key].append(sample)
    asking: dict[tuple[int, ...], set[str]] = defaultdict(set)
    for key, samples in lacks.items():
        asking[tuple(samples)].add(key)
    scoring = shared.only(unscored)
    if specs[0].method == NO_METHOD:
        edits, scored = None, [_base_scores(scoring) for _ in specs]
    else:
        edits = [load_edit(shared.edits / part.record.edit) for part in parts]
        scored = _score(scoring, specs, edits) if unscored else [{} for _ in specs]
    found: list[dict[tuple[str, int], str]] = [{} for _ in specs]
    for samples, chosen in asking.items():
        asked = shared.only(frozenset(chosen))
        for texts, said in zip(found, _answers(asked, tuple(asked.splits), edits, {}, samples), strict=True):
            for name, rows in said.items():
                for sample, lines in zip(samples, rows, strict=True):
                    texts |= zip(product(asked.splits[name].keys, [sample]), lines, strict=True)
    out: list[Result] = []
    for spec, part, scores, more in zip(specs, parts, scored, found, strict=True):
        if scores is None:
            out.append((TrialRecord(spec, "diverged", NOT_FINITE, training=part.record.training), None))
            continue
        # Old and new values are joined by question key, then put back in the order of each split.
        values, texts = dict(part.scores), {**part.answers, **more}
        for name, metrics in scores.get("questions", {}).items():
            for i, key in enumerate(scoring.splits[name].keys):
                values[key] = {metric: row[i] for metric, row in metrics.items()}
        for name, lines in scores.get("answers", {}).items():
            for sample, row in enumerate((lines, *scores["samples"].get(name, ()))):
                texts |= zip(product(scoring.splits[name].keys, [sample]), row, strict=True)
        keys = {name: shared.splits[name].keys for name in scored_splits(shared.config, spec)}
        out.append((join(Kept(replace(part.record, spec=spec), values, texts), keys), None))
    return out


def _run_new(shared: Shared, specs: Sequence[TrialSpec], on_step: OnStep | None) -> list[Result]:
    """Fit edits, then score all that did not diverge as one bank."""
    if specs[0].method == NO_METHOD:
        return [(TrialRecord(spec, "ok", "", **_base_scores(shared)), None) for spec in specs]
    with shared.timed("edit"):
        fits = _fit(shared, specs, on_step)
    alive = [i for i, fit in enumerate(fits) if fit.edit is not None]
    scored = iter(_score(shared, specs, [fits[i].edit for i in alive]) if alive else [])
    out: list[Result] = []
    for spec, fit in zip(specs, fits, strict=True):
        training = {name: (x,) for name, x in fit.facts.items()} | ({"loss": fit.losses} if fit.losses else {})
        scores = None if fit.edit is None else next(scored)
        if scores is None:
            out.append((TrialRecord(spec, "diverged", fit.message or NOT_FINITE, training=training), None))
        else:
            record = TrialRecord(spec, "ok", "", **scores, training=training, edit=spec.edit_file)
            out.append((record, fit.edit))
    for spec in specs:  # only now: if `_score` runs out of memory, the fits are used again
        shared.fitted.pop(spec.trial_id, None)
    return out


def _fit(shared: Shared, specs: Sequence[TrialSpec], on_step: OnStep | None) -> list[Fit]:
    """Fit the trials' edits, reusing those in `shared.fitted`. Trained methods train ``bank_size`` edits at a time."""
    method, settings = METHODS[specs[0].method], shared.config.methods[specs[0].method]
    todo = [spec for spec in specs if spec.trial_id not in shared.fitted]
    size = (getattr(settings, "bank_size", None) or 1) if method.trained else max(len(todo), 1)
    alike: dict[int, list[TrialSpec]] = {}  # each placebo has training questions of its own
    for spec in todo:
        alike.setdefault(spec.control if spec.arm == "placebo" else -1, []).append(spec)
    for number, part in alike.items():
        data = shared if number < 0 else shared.for_placebo(number)
        for start in range(0, len(part), size):
            bank = part[start : start + size]
            jobs = [Job(spec.location, spec.hyperparameter, spec.rng_seed, spec.draw) for spec in bank if spec.location]
            for spec, fit in zip(bank, method.fitter(data, jobs, settings, on_step), strict=True):
                shared.fitted[spec.trial_id] = fit
    return [shared.fitted[spec.trial_id] for spec in specs]


def _score(shared: Shared, specs: Sequence[TrialSpec], edits: Sequence[Edit]) -> list[dict[str, Any] | None]:
    """Score a bank of edits.

    Returns for each edit its record's metrics, drift, questions and answers; None if a number is not finite.
    """
    bank = stack(shared.model, edits)
    names = run_splits(shared, specs[0])
    with shared.timed("score"):
        prefixes = _prefixes(shared, names, bank)
        # split -> for each question, log-probabilities (edits, answers)
        sums = {
            name: answer_log_probs(
                shared.model,
                shared.splits[name].forest,
                bank,
                prefix=prefixes[name],
                residuals=shared.residuals[name],
                row_tokens=shared.row_tokens,
            )
            for name in names
        }
    with shared.timed("edit"):
        drift = measure_drift(shared.model, shared.drift, bank) if shared.drift else [{} for _ in edits]
    alive = [
        k
        for k in range(len(edits))
        if all(torch.isfinite(x[k]).all() for rows in sums.values() for x in rows)
        and all(map(math.isfinite, drift[k].values()))
    ]
    # The prefixes' keys and values have a row per edit of the whole bank, so they fit only if no edit is left out.
    whole_bank = len(alive) == len(edits)
    cached, first = prefixes if whole_bank else {}, shared.config.evaluation.first_samples
    said = _answers(shared, names, [edits[k] for k in alive], cached, first) if alive else []
    out: list[dict[str, Any] | None] = [None] * len(edits)
    for k, answers in zip(alive, said, strict=True):
        out[k] = _measured(shared, {name: [x[k] for x in rows] for name, rows in sums.items()}, drift[k], answers)
    return out


def _measured(
    shared: Shared, sums: Mapping[str, Sequence[Tensor]], drift: Mapping[str, float], said: Said
) -> dict[str, Any]:
    """A record's fields, from the answer log-probabilities of each split: one tensor (answers,) per question."""
    dtype = str(shared.model.lm.dtype).removeprefix("torch.")
    questions = {
        name: score_questions(
            shared.splits[name].questions, rows, shared.splits[name].reference, dtype, shared.config.ipo_aim
        )
        for name, rows in sums.items()
        if name.partition(":")[0] not in RELATED
    }
    for name in sums.keys() - questions.keys():
        (kind, _, part), held = name.partition(":"), shared.splits[name]
        found: dict[str, list[float]] = defaultdict(list)
        for key, value in zip(held.keys, score_prompts(kind, held.questions, sums[name]), strict=True):
            found[key].append(value)
        questions[part][RELATED[kind]] = tuple(fmean(found[key]) for key in shared.splits[part].keys)
    answers, samples = ({name: rows[0] for name, rows in said.items()},
                        {name: rows[1:] for name, rows in said.items() if rows[1:]})  # fmt: skip
    scores = {"metrics": mean_metrics(questions), "drift": drift, "questions": questions}
    return {**scores, "answers": answers, "samples": samples}


def _prefixes(shared: Shared, names: Sequence[str], bank: EditBank) -> dict[str, Prefix | None]:
    """KV cache of the prefix of each split's prompts under the bank; splits with equal prefixes share one."""
    out: dict[tuple[int, ...], Prefix | None] = {}
    with torch.no_grad():
        for name in names:
            prefix = shared.splits[name].forest.prefix
            if prefix not in out:
                out[prefix] = run_prefix(shared.model, prefix, bank)
    return {name: out[shared.splits[name].forest.prefix] for name in names}


def _answers(
    shared: Shared,
    names: Sequence[str],
    edits: Sequence[Edit] | None,
    prefixes: Mapping[str, Prefix | None],
    samples: Sequence[int],
) -> list[Said]:
    """Generate the samples with these numbers, to validation and test questions.

    `edits` None stands for the unedited model alone.
    """
    names = [name for name in names if name in ("val", "test")]
    limit = shared.config.evaluation.max_new_tokens
    n_edits = 1 if edits is None else len(edits)
    if not limit or not samples:
        return [{} for _ in range(n_edits)]
    with shared.timed("answer" if min(samples) <= 1 else "sample"):
        said = {
            name: answer_prompts(
                shared.model,
                shared.splits[name].forest,
                edits,
                max_new_tokens=limit,
                samples=samples,
                cache=shared.cache,
                answer_format=shared.answer_format,
                cached_prefix=prefixes.get(name),
                batch_tokens=shared.row_tokens,
            )
            for name in names
        }
    return [{name: said[name][k] for name in names} for k in range(n_edits)]


def _base_scores(shared: Shared) -> dict[str, Any]:
    """Scores of the unedited model. Its log-probabilities are the reference, so nothing is scored again."""
    drift = measure_drift(shared.model, shared.drift, None)[0] if shared.drift else {}
    answers = _answers(shared, tuple(shared.splits), None, {}, shared.config.evaluation.first_samples)[0]
    sums = {name: held.reference for name, held in shared.splits.items()}
    return _measured(shared, sums, drift, answers)
