"""Repeat the held-out measurement of a fitted judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError
from locaudit.judges.labelled import SPLIT_RULE
from locaudit.judges.reference.data import Labelled, load_judge_data
from locaudit.judges.reference.features import read_question
from locaudit.judges.reference.judge import Engine, installed_language_model
from locaudit.judges.reference.metrics import measure
from locaudit.judges.reference.weights import ASPECT_NAMES, BUNDLED, load_weights
from locaudit.models import Model

_PARTS = {"non_reference": (False,), "reference": (True,), "all": (False, True)}


def validate_reference_judge(
    truth: Path,
    info: Path,
    references: Path | None,
    *,
    weights: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    device: str = "auto",
    model: Model | None = None,
) -> dict[str, Any]:
    """Score the held-out questions' distinct answers as the judge does and compare with the labels.

    Per aspect, and apart for answers that equal no reference of their question (``non_reference``) and those that do:
    what `measure` reports. ``trees_only`` is the same for the trees alone, without the networks. `references` None
    finds the file that the weights were fitted with. Plain values, ready for JSON. Raises `DataError`.
    """
    say = progress or (lambda text: None)
    fitted = load_weights(BUNDLED if weights is None else Path(weights))
    if fitted.meta["split"] != SPLIT_RULE:
        raise DataError(
            got=f"weights with the split {fitted.meta['split']!r}",
            expected=SPLIT_RULE,
            remedy="validate with the version of locaudit that fitted them",
        )
    data = load_judge_data(truth, info, references, known_sha256=fitted.meta["references_sha256"], only_known=True)
    held_out = data.part(held_out=True)
    groups = [list(group) for _, group in groupby(held_out, lambda item: normalise(item.case.question))]
    name = installed_language_model() if model is None else model.fingerprint
    reader = Engine(fitted, device, model, name).reader
    found, trees = [], []
    for number, group in enumerate(groups):
        read = read_question(reader, fitted.moments, group[0].case, [item.case.answer for item in group])
        found.append(fitted.probabilities(read))
        odds = np.stack([fitted.trees[aspect](read.raw) for aspect in ASPECT_NAMES], axis=1)
        trees.append(1 / (1 + np.exp(-odds)))
        if number % 20 == 19 or number == len(groups) - 1:
            say(f"scored {number + 1} of {len(groups)} held-out questions")
    both = {"aspects": found, "trees_only": trees}
    return {
        "weights_sha256": fitted.meta["weights_sha256"],
        "language_model": name,
        "split": SPLIT_RULE,
        "references_sha256": data.references_sha256,
        "same_data_as_fit": data.counts == fitted.meta["counts"],
        "counts": dict(data.counts),
        "held_out_questions": len(groups),
        "held_out_pairs": len(held_out),
        "cross_validation": fitted.meta["cross_validation"],
        **{key: _report(held_out, np.concatenate(p) if p else np.zeros((0, 2))) for key, p in both.items()},
    }


def _report(items: Sequence[Labelled], p: np.ndarray) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for column, aspect in enumerate(ASPECT_NAMES):
        out[aspect] = {}
        for part, kinds in _PARTS.items():
            used = [i for i, item in enumerate(items) if item.is_reference in kinds and item.labels[aspect] is not None]
            y = np.array([bool(items[i].labels[aspect]) for i in used], dtype=bool)
            questions = [normalise(items[i].case.question) for i in used]
            out[aspect][part] = measure(p[used, column] if used else np.zeros(0), y, questions)
    return out
