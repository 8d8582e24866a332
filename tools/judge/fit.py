"""Fit the reference judge: a frozen language model reads all answers once, then networks are fitted, by folds.

    python tools/judge/fit.py --truth finetune_truth.jsonl --info finetune_info.jsonl --out DIR

The files have the format of TruthfulQA's judge data. The reference answers are in the ``TruthfulQA*.csv`` beside them,
or in ``--references FILE``. The questions are dealt into folds, and each question is judged, now and ever after, by
networks that were fitted without its fold. ``--others FILE`` names further files with questions, such as another
release, whose questions join the fold of their near-duplicates. The result is reproducible with the same seed, number
of threads and machine. Needs scikit-learn (the extra ``judge``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from scipy.optimize import minimize
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from degenerate import Pool, make
from folds import NEAR_DUPLICATES, deal
from parts import fit_network

from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError, LocauditError, import_extra
from locaudit.judges import Case
from locaudit.judges.labelled import read_labelled
from locaudit.judges.reference.features import SKIPPED, Moments, Read, read_question
from locaudit.judges.reference.judge import LANGUAGE_MODEL, installed_language_model
from locaudit.judges.reference.reader import MAX_ANSWER_TOKENS, MAX_REFERENCES, Reader
from locaudit.judges.reference.weights import ASPECT_NAMES, CODE_VERSION, META, TENSORS, Weights, question_key, sigmoid
from locaudit.judges.validate import (
    cell,
    distinct,
    find_references,
    is_reference,
    measure,
    read_references,
    sha256_of,
)
from locaudit.models import Model, load_model
from locaudit.records import content_hash
from locaudit.registry import ASPECTS
from locaudit.store.files import write_atomically

LAYERS = (8, 12, 16)
"""Layers whose states the judge reads, counted from 1."""
N_FOLDS = 5
"""Number of folds of questions."""
N_NETWORKS = 2
"""Number of networks per fold, with different seeds, that are averaged."""
N_FOR_MOMENTS = 100
"""Number of questions whose prompts give the mean and standard deviation of the states."""
COPY_WEIGHT = 0.3
"""Weight of an answer that equals a reference it is compared with; little can be learned from it."""
DEGENERATE_WEIGHT = 0.3
"""Weight of a degenerate answer, of which there are several per question."""
FIT_DTYPE = "bfloat16"
"""The language model's precision while fitting: twice as fast as float32, which the judge uses to score."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Example:
    """The answers to one training question, read and labelled."""

    question: str
    read: Read
    labels: Tensor
    """(answers, 2): 1 for yes, 0 for no or no label; columns as `ASPECT_NAMES`."""
    weights: Tensor
    """(answers, 2): weight in the fit; 0 without a label."""
    calibrates: Tensor
    """(answers,): 1 for answers that are not references and were not made up; the probabilities are calibrated on
    these. Else 0."""


def fit_reference_judge(
    truth: Path,
    info: Path,
    references: Path | None,
    out: Path,
    *,
    others: Sequence[Path] = (),
    seed: int = 0,
    say: Say = lambda text: None,
    model: Model | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Fit both aspects, write a folder for `load_reference_judges`, and return its out-of-fold measures by aspect.

    `others` are further files with questions for the table of folds. `cache` is a folder for what the language model
    read, so that an interrupted fit can resume. Raises `DataError` for unusable files, `ConfigError` without
    scikit-learn.
    """
    prepare(out)
    files = dict(zip(ASPECT_NAMES, (truth, info), strict=True))
    file = references or find_references(truth)
    if file is None:
        raise DataError(
            got=f"no single TruthfulQA*.csv in the folder of {truth} or its parent",
            expected="the reference answers to the questions",
            remedy="name their file with --references",
        )
    labels, counts = read_labels(files, file)
    groups = [list(group) for _, group in groupby(labels, lambda case: normalise(case.question))]
    known = read_references(file)
    for other in others:
        known = read_references(other) | known
    folds = deal(list(known.values()), N_FOLDS)
    if len(set(folds.values())) < N_FOLDS:
        raise DataError(
            got=f"{len(known)} questions, of which too many are near-duplicates",
            expected=f"at least {N_FOLDS} different questions to fit on",
            remedy="give files with more questions",
        )
    name = installed_language_model() if model is None else model.fingerprint
    lm = model or load_model(LANGUAGE_MODEL, dtype=FIT_DTYPE)
    reader = Reader(lm, sorted({min(layer, lm.n_layers) for layer in LAYERS}))
    by_hash = sorted(groups, key=lambda group: hashlib.sha256(group[0].question.encode()).hexdigest())
    moments = find_moments(reader, [group[0] for group in by_hash[:N_FOR_MOMENTS]])
    examples, pool = [], Pool([group[0] for group in groups])
    identity = f"{name} {lm.lm.dtype}"
    for number, group in enumerate(groups, 1):
        made_up = {replace(group[0], answer=answer): {"info": False} for answer in make(group[0], pool, seed).values()}
        examples.append(example(reader, moments, group, labels, cache, identity))
        examples.append(example(reader, moments, list(made_up), made_up, cache, identity, made_up=True))
        if number % 20 == 0 or number == len(groups):
            say(f"read {number} of {len(groups)} questions")
    meta = {
        "format": CODE_VERSION,
        "layers": list(reader.layers),
        "n_networks": N_NETWORKS,
        "n_folds": N_FOLDS,
        "language_model": {"version": name, "fit_dtype": str(lm.lm.dtype)},
        "seed": seed,
        "near_duplicates": NEAR_DUPLICATES,
        **{f"{key}_sha256": sha256_of(path) for key, path in (*files.items(), ("references", file))},
        "counts": counts,
    }
    weights = fit_all(examples, moments, {question_key(text): fold for text, fold in folds.items()}, meta, seed, say)
    save_weights(out, weights)
    write_card(out, weights.meta)
    return weights.meta["out_of_fold"]


def prepare(out: Path) -> None:
    """Check now what would fail only at the end: a missing package, a folder that cannot be written to."""
    import_extra("sklearn.ensemble", "judge")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / ".probe", b"")
        (out / ".probe").unlink()
    except OSError as error:
        raise DataError(
            got=f"{out}, which cannot be written to ({error.strerror})",
            expected="a writable folder for the weights",
            remedy="name another folder",
        ) from None


def read_labels(files: Mapping[str, Path], references: Path) -> tuple[dict[Case, dict[str, bool]], dict[str, int]]:
    """Case -> aspect -> label, for distinct answers whose question has references; and counts for the record.

    Cases of one question are adjacent.
    """
    known, labels, n_rows = read_references(references), defaultdict(dict), {}
    for aspect, path in files.items():
        rows = read_labelled(path, ASPECTS[aspect])
        n_rows[aspect] = len(rows)
        for row in distinct(rows, known):
            labels[row.case][aspect] = row.yes
    questions = {normalise(case.question) for case in labels}
    unknown = questions - set(known)
    ordered = sorted(labels, key=lambda case: (normalise(case.question), case.answer))
    kept = {case: labels[case] for case in ordered if normalise(case.question) not in unknown}
    counts = {
        "rows": max(n_rows.values()),
        "distinct_pairs": len(kept),
        "reference_pairs": sum(map(is_reference, kept)),
        "questions": len(questions - unknown),
        "questions_without_references": len(unknown),
    }
    return kept, counts


def find_moments(reader: Reader, cases: Sequence[Case]) -> Moments:
    """Mean and standard deviation of the states over the prompts of the cases."""
    states = torch.cat([reader.prompt(case).states[:, SKIPPED:] for case in cases], dim=1)
    return Moments(states.mean(1, keepdim=True), states.std(1, keepdim=True) + 1e-3)


def example(
    reader: Reader,
    moments: Moments,
    group: Sequence[Case],
    labels: Mapping[Case, Mapping[str, bool]],
    cache: Path | None,
    identity: str,
    *,
    made_up: bool = False,
) -> Example:
    """Read and label the answers to one question; `made_up` ones are degenerate.

    An answer that equals a reference would be trivial to judge. For three in four of them, that reference is hidden, so
    that they train the judge as other answers do. `cache` holds what the language model read; `identity` names it.
    """
    copies = [is_reference(case) and not made_up for case in group]
    hides = [copy and not stays(case) for copy, case in zip(copies, group, strict=True)]
    question, true, false = group[0].question, group[0].true, group[0].false
    key = content_hash([identity, reader.layers, question, true, false, [case.answer for case in group], hides])
    path = None if cache is None else cache / f"{key}.safetensors"
    if path is not None and path.is_file():
        kept = load(path.read_bytes())
        read = Read(kept["raw"].numpy(), kept["prompt"], kept["answers"].split(kept["lengths"].tolist()), kept["sees"])
    else:
        read = read_group(reader, moments, group, hides)
    if path is not None and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        lengths = torch.tensor([len(answer) for answer in read.answers])
        tensors = {"raw": torch.from_numpy(read.raw), "prompt": read.prompt, "answers": torch.cat(read.answers)}
        tensors |= {"lengths": lengths, "sees": read.sees}
        write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    found = [[labels[case].get(aspect) for aspect in ASPECT_NAMES] for case in group]
    seen = torch.tensor([copy and not hide for copy, hide in zip(copies, hides, strict=True)])
    is_known = torch.tensor([[float(label is not None) for label in row] for row in found])
    return Example(
        normalise(group[0].question),
        read,
        torch.tensor([[float(label or 0) for label in row] for row in found]),
        torch.where(seen[:, None], COPY_WEIGHT, DEGENERATE_WEIGHT if made_up else 1.0) * is_known,
        torch.tensor([float(not copy and not made_up) for copy in copies]),
    )


def stays(case: Case) -> bool:
    """Whether an answer that equals a reference is compared with it: one in four is, chosen by hash."""
    text = "seen" + normalise(case.question) + normalise(case.answer)
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 4 == 0


def read_group(reader: Reader, moments: Moments, group: Sequence[Case], hides: Sequence[bool]) -> Read:
    """Read the answers to a question. If ``hides[i]``, the references equal to answer i are hidden from it."""
    names = [normalise(text) for side in (group[0].true, group[0].false) for text in side[:MAX_REFERENCES]]
    # Numbers of the hidden references -> answers that do not see them; each group is read together.
    parts: dict[frozenset[int], list[int]] = defaultdict(list)
    for i, (case, hide) in enumerate(zip(group, hides, strict=True)):
        same = {k for k, name in enumerate(names) if hide and name == normalise(case.answer)}
        parts[frozenset(same)].append(i)
    reads = [
        read_question(reader, moments, group[0], [group[i].answer for i in numbers], hidden)
        for hidden, numbers in parts.items()
    ]
    # Restores the original order of the answers.
    back = np.argsort([i for numbers in parts.values() for i in numbers])
    answers = [answer for read in reads for answer in read.answers]
    return Read(
        np.concatenate([read.raw for read in reads])[back],
        reads[0].prompt,
        tuple(answers[i] for i in back),
        torch.cat([read.sees for read in reads])[torch.from_numpy(back)],
    )


def fit_all(
    examples: Sequence[Example],
    moments: Moments,
    folds: Mapping[int, int],
    meta: dict[str, Any],
    seed: int,
    say: Say,
) -> Weights:
    """Fit networks without each fold, and calibrate those of a fold by the out-of-fold log-odds of the other folds."""
    raw = torch.from_numpy(np.concatenate([example.read.raw for example in examples])).float()
    weights = Weights(moments, raw.mean(0), raw.std(0) + 1e-3, [], np.zeros((N_FOLDS, 2, 2)), folds, meta)
    inputs = [(example.read, weights.dense(example.read)) for example in examples]
    fold = np.array([folds[question_key(example.question)] for example in examples])
    networks = []
    for number in range(N_FOLDS):
        say(f"fitting without fold {number + 1} of {N_FOLDS}")
        inside = np.flatnonzero(fold != number).tolist()
        parts = inputs, [e.labels for e in examples], [e.weights for e in examples]
        data = [[part[i] for i in inside] for part in parts]
        # Rounded as they are stored, so that what is measured here is what will judge.
        networks.append([fit_network(*data, seed + i).half().float() for i in range(N_NETWORKS)])
    weights = replace(weights, networks=networks)
    odds = np.concatenate([weights.log_odds(e.read, k) for e, k in zip(examples, fold.tolist(), strict=True)])
    y, w = stacked([example.labels for example in examples]), stacked([example.weights for example in examples])
    counted = (w > 0) & (stacked([example.calibrates for example in examples]) > 0)[:, None]  # (answers, aspects)
    sizes = [len(example.labels) for example in examples]
    row_fold, question = np.repeat(fold, sizes), np.repeat([example.question for example in examples], sizes)
    scale, p = np.zeros((N_FOLDS, 2, 2)), np.full(odds.shape, np.nan)
    for number in range(N_FOLDS):
        here = row_fold == number
        for column in range(2):
            rest = counted[:, column] & ~here
            scale[number, column] = calibrate(odds[rest, column], y[rest, column])
        p[here] = sigmoid(odds[here] * scale[number, :, 0] + scale[number, :, 1])

    def measures(rows: np.ndarray) -> dict[str, Any]:
        used = [rows & counted[:, column] for column in range(2)]
        found = (measure(p[u, i], y[u, i] > 0.5, question[u]) for i, u in enumerate(used))
        return dict(zip(ASPECT_NAMES, found, strict=True))

    meta = {**meta, "out_of_fold": measures(row_fold >= 0)}
    return replace(weights, scale=scale, meta={**meta, "by_fold": [measures(row_fold == k) for k in range(N_FOLDS)]})


def calibrate(odds: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Logistic regression of labels y (n,) on log-odds (n,): slope and intercept (Platt 1999)."""
    x = np.column_stack([odds, np.ones(len(odds))])
    return minimize(lambda s: float(np.mean(np.logaddexp(0, x @ s) - y * (x @ s))), np.array([1.0, 0.0])).x


def stacked(values: Sequence[Tensor]) -> np.ndarray:
    """The rows of all questions, concatenated, in float64."""
    return torch.cat(list(values)).double().numpy()


def save_weights(folder: Path, weights: Weights) -> None:
    """Write both files, each atomically."""
    tensors: dict[str, Tensor] = {
        "moments.center": weights.moments.center,
        "moments.scale": weights.moments.scale,
        "dense.mean": weights.mean,
        "dense.deviation": weights.deviation,
        "scale": torch.from_numpy(weights.scale),
        "folds.key": torch.tensor(list(weights.folds), dtype=torch.int64),
        "folds.fold": torch.tensor(list(weights.folds.values()), dtype=torch.uint8),
    }
    for fold, networks in enumerate(weights.networks):
        for number, network in enumerate(networks):
            tensors |= {f"network.{fold}.{number}.{name}": x.half() for name, x in network.state_dict().items()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    meta = {**weights.meta, "weights_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / TENSORS, content)
    write_atomically(folder / META, (json.dumps(meta, indent=2, sort_keys=True) + "\n").encode())


def write_card(folder: Path, meta: Mapping[str, Any]) -> None:
    """Write ``MODEL_CARD.md`` from the record of the fit."""
    keys = ("n", "n_questions", "majority", "accuracy", "accuracy_95", "balanced_accuracy", "brier", "ece", "auc")
    lines = [f"| aspect | fold | {' | '.join(keys)} |", "|---" * (len(keys) + 2) + "|"]
    for aspect in ASPECT_NAMES:
        for number, found in [*enumerate(meta["by_fold"], 1), ("all", meta["out_of_fold"])]:
            lines.append(f"| {aspect} | {number} | {' | '.join(cell(found[aspect].get(key)) for key in keys)} |")
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    text = template.format(
        **meta["counts"],
        **{key: meta[key] for key in ("references_sha256", "near_duplicates", "n_folds", "n_networks")},
        layers=", ".join(map(str, meta["layers"])),
        table="\n".join(lines),
        max_tokens=MAX_ANSWER_TOKENS,
    )
    write_atomically(folder / "MODEL_CARD.md", text.encode())


def main() -> None:
    """Fit a judge from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("truth", "info", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--others", type=Path, nargs="*", default=(), help="further files with questions")
    parser.add_argument("--cache", type=Path, help="folder that stores what the language model read, to resume a fit")
    parser.add_argument("--seed", type=int, default=0)
    try:
        fit_reference_judge(**vars(parser.parse_args()), say=lambda text: print(text, file=sys.stderr, flush=True))
    except LocauditError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
