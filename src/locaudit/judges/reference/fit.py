"""Fit the reference judge: the language model reads once, then networks, trees and their blend are fitted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError
from locaudit.judges.labelled import SPLIT_RULE, fold_of
from locaudit.judges.reference.cache import CachedReader
from locaudit.judges.reference.card import write_card
from locaudit.judges.reference.data import Labelled, load_judge_data, sha256_of
from locaudit.judges.reference.features import (
    LAYERS,
    Moments,
    Read,
    Reading,
    find_moments,
    read_question,
)
from locaudit.judges.reference.judge import installed_language_model, load_language_model
from locaudit.judges.reference.network import Comparer, fit_network
from locaudit.judges.reference.reader import MAX_ANSWER_TOKENS, Reader
from locaudit.judges.reference.trees import Trees, booster, fit_trees
from locaudit.judges.reference.validate import validate_reference_judge
from locaudit.judges.reference.weights import (
    ASPECT_NAMES,
    BUNDLED,
    CODE_VERSION,
    Weights,
    load_meta,
    prepare_folder,
    save_weights,
)
from locaudit.models import Model

N_FOLDS = 3
"""Folds of questions whose left-out log-odds the blend is fitted on."""
N_NETWORKS = 2
"""Networks of different seeds that are averaged."""
N_FOR_MOMENTS = 100
"""Questions whose prompts give the moments of the states."""
COPY_WEIGHT = 0.3
"""Weight of an answer that equals a reference it sees: there is little to learn from it."""
FIT_DTYPE = "bfloat16"
"""The language model's precision while fitting; twice as fast as float32, in which the judge scores."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Example:
    """A fit question's answers, read and labelled."""

    question: str
    read: Read
    labels: Float[Tensor, "answers 2"]
    weights: Float[Tensor, "answers 2"]
    """0 without a label."""
    blends: Float[Tensor, " answers"]
    """1 for answers that are no references: the blend is fitted on them."""


def fit_reference_judge(
    truth: Path,
    info: Path,
    references: Path | None,
    out: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    model: Model | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Fit both aspects, write a folder that `load_reference_judges` takes, and return its held-out report.

    The files are laid out like TruthfulQA's judge data (see `load_judge_data`). Held-out questions take no part in the
    fit. With the seed, the number of threads and the machine the result repeats. `cache` keeps the language model's
    states, so that a fit that was stopped goes on from there. Raises `DataError`, and `LocauditError` without
    scikit-learn.
    """
    say = progress or (lambda text: None)
    booster()  # what would fail at the end fails now
    known = load_meta(BUNDLED)["references_sha256"] if (BUNDLED / "judge.json").is_file() else None
    data = load_judge_data(truth, info, references, known_sha256=known, only_known=False)
    groups = [
        list(group) for _, group in groupby(data.part(held_out=False), lambda item: normalise(item.case.question))
    ]
    if len(groups) < 2 * N_FOLDS:
        raise DataError(
            got=f"{len(groups)} questions to fit on ({SPLIT_RULE})",
            expected=f"at least {2 * N_FOLDS}",
            remedy="give files with more questions",
        )
    name = installed_language_model() if model is None else model.fingerprint
    prepare_folder(Path(out))
    lm = model or load_language_model("auto", FIT_DTYPE)
    layers = tuple(sorted({min(layer, lm.n_layers) for layer in LAYERS}))
    reader: Reading = Reader(lm, layers)
    if cache is not None:
        reader = CachedReader(reader, Path(cache), f"{name} {lm.lm.dtype}")
    by_hash = sorted(groups, key=lambda group: hashlib.sha256(group[0].case.question.encode()).hexdigest())
    moments = find_moments(reader, [group[0].case for group in by_hash[:N_FOR_MOMENTS]])
    examples = []
    for number, group in enumerate(groups):
        examples.append(_example(reader, moments, group))
        if number % 20 == 19 or number == len(groups) - 1:
            say(f"read {number + 1} of {len(groups)} questions")
    meta = {
        "format": CODE_VERSION,
        "layers": list(layers),
        "n_networks": N_NETWORKS,
        "n_folds": N_FOLDS,
        "language_model": {"version": name, "fit_dtype": str(lm.lm.dtype)},
        "seed": seed,
        "split": SPLIT_RULE,
        "truth_sha256": sha256_of(Path(truth)),
        "info_sha256": sha256_of(Path(info)),
        "references_sha256": data.references_sha256,
        "counts": dict(data.counts),
        "fit_questions": len(groups),
        "fit_pairs": sum(map(len, groups)),
    }
    weights = _fit(examples, moments, meta, seed, say)
    save_weights(Path(out), weights)
    say("measuring on held-out questions")
    report = validate_reference_judge(truth, info, references, weights=out, progress=progress, model=model)
    write_card(Path(out), report, weights.meta, max_tokens=MAX_ANSWER_TOKENS)
    return report


def _example(reader: Reading, moments: Moments, group: Sequence[Labelled]) -> Example:
    hides = [item.is_reference and not _stays(item) for item in group]
    read = read_question(reader, moments, group[0].case, [item.case.answer for item in group], hides)
    labels = torch.tensor([[float(item.labels[aspect] or 0) for aspect in ASPECT_NAMES] for item in group])
    known = torch.tensor([[float(item.labels[aspect] is not None) for aspect in ASPECT_NAMES] for item in group])
    copies = torch.tensor([item.is_reference and not hide for item, hide in zip(group, hides, strict=True)])
    blends = torch.tensor([float(not item.is_reference) for item in group])
    return Example(
        normalise(group[0].case.question), read, labels, torch.where(copies[:, None], COPY_WEIGHT, 1.0) * known, blends
    )


def _stays(item: Labelled) -> bool:
    """Whether an answer that is a reference sees it: one in four does, the others teach as if they were none."""
    text = "seen" + normalise(item.case.question) + normalise(item.case.answer)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 4 == 0


def _fit(examples: Sequence[Example], moments: Moments, meta: dict[str, Any], seed: int, say: Progress) -> Weights:
    raw = torch.from_numpy(np.concatenate([example.read.raw for example in examples])).float()
    mean, deviation = raw.mean(0), raw.std(0) + 1e-3
    fold = np.array([fold_of(example.question, N_FOLDS) for example in examples])
    left_out = [np.zeros((len(example.labels), 2, 2)) for example in examples]
    for number in range(N_FOLDS):
        say(f"fitting without fold {number + 1} of {N_FOLDS}")
        inside = [example for example, f in zip(examples, fold, strict=True) if f != number]
        network, trees = _networks(inside, mean, deviation, [seed]), _trees(inside, seed)
        part = Weights(moments, mean, deviation, network, trees, np.zeros((2, 3)), meta)
        for i in np.flatnonzero(fold == number).tolist():
            read = examples[i].read
            left_out[i][:, :, 0] = part.network_log_odds(read)
            left_out[i][:, :, 1] = np.stack([trees[aspect](read.raw) for aspect in ASPECT_NAMES], axis=1)
    say("fitting on all questions for fitting")
    networks = _networks(examples, mean, deviation, [seed + i for i in range(N_NETWORKS)])
    stack, agreement = _blend(examples, left_out)
    meta = {**meta, "cross_validation": agreement}
    return Weights(moments, mean, deviation, networks, _trees(examples, seed), stack, meta)


def _networks(
    examples: Sequence[Example], mean: Tensor, deviation: Tensor, seeds: Sequence[int]
) -> tuple[Comparer, ...]:
    groups = [example.read.group(mean, deviation) for example in examples]
    labels, weights = [example.labels for example in examples], [example.weights for example in examples]
    return tuple(fit_network(groups, labels, weights, seed) for seed in seeds)


def _trees(examples: Sequence[Example], seed: int) -> dict[str, Trees]:
    x = np.concatenate([example.read.raw for example in examples])
    labels, weights = (_stacked(examples, name) for name in ("labels", "weights"))
    out = {}
    for column, aspect in enumerate(ASPECT_NAMES):
        used = weights[:, column] > 0
        out[aspect] = fit_trees(x[used], labels[used, column] > 0.5, weights[used, column], seed)
    return out


def _blend(examples: Sequence[Example], left_out: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
    """Logistic regression of the labels on both parts' left-out log-odds; then its accuracies, for the record."""
    from scipy.optimize import minimize

    labels, weights, blends = (_stacked(examples, name) for name in ("labels", "weights", "blends"))
    odds, stack, agreement = np.concatenate(left_out), [], {}
    for column, aspect in enumerate(ASPECT_NAMES):
        used = (weights[:, column] > 0) & (blends > 0)
        x, y = np.column_stack([odds[used, column], np.ones(used.sum())]), labels[used, column]

        def loss(s: np.ndarray, x=x, y=y) -> float:
            return float(np.mean(np.logaddexp(0, x @ s) - y * (x @ s)) + 1e-3 * np.sum(s[:2] ** 2))

        s = minimize(loss, np.array([0.5, 0.5, 0.0]), method="BFGS").x
        stack.append(s)
        parts = {"networks": x[:, 0], "trees": x[:, 1], "both": x @ s}
        agreement[aspect] = {name: round(float(np.mean((z > 0) == (y > 0.5))), 4) for name, z in parts.items()}
        agreement[aspect]["n"] = int(used.sum())
    return np.array(stack), agreement


def _stacked(examples: Sequence[Example], name: str) -> np.ndarray:
    return np.concatenate([getattr(example, name).double().numpy() for example in examples])
