"""Fit the reference judge: a frozen language model reads all answers once, then networks, trees and a blend are fitted.

    python tools/judge/fit.py --truth finetune_truth.jsonl --info finetune_info.jsonl --out DIR

The files have the format of TruthfulQA's judge data. The reference answers are in the ``TruthfulQA*.csv`` beside them,
or in ``--references FILE``. Held-out questions are not used in the fit; they measure the judge at its end. The result
is reproducible with the same seed, number of threads and machine. Needs scikit-learn (the extra ``judge``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from scipy.optimize import minimize
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from parts import fit_network, fit_trees

from locaudit.behaviours.behaviour import normalise
from locaudit.errors import DataError, LocauditError, import_extra
from locaudit.judges import Case
from locaudit.judges.labelled import SPLIT_RULE, is_held_out, read_labelled
from locaudit.judges.reference.features import SKIPPED, Moments, Read, read_question
from locaudit.judges.reference.judge import LANGUAGE_MODEL, installed_language_model, load_reference_judges
from locaudit.judges.reference.network import Comparer
from locaudit.judges.reference.reader import MAX_ANSWER_TOKENS, MAX_REFERENCES, Reader
from locaudit.judges.reference.trees import Trees
from locaudit.judges.reference.weights import ASPECT_NAMES, CODE_VERSION, META, TENSORS, Weights
from locaudit.judges.validate import (
    as_table,
    distinct,
    find_references,
    is_reference,
    read_references,
    sha256_of,
    validate,
)
from locaudit.models import Model, load_model
from locaudit.records import content_hash
from locaudit.registry import ASPECTS
from locaudit.store.files import write_atomically

LAYERS = (8, 12, 16)
"""Layers whose states the judge reads, counted from 1."""
N_FOLDS = 3
"""Number of cross-validation folds (of questions); the blend is fitted on out-of-fold log-odds."""
N_NETWORKS = 2
"""Number of networks with different seeds that are averaged."""
N_FOR_MOMENTS = 100
"""Number of questions whose prompts give the mean and standard deviation of the states."""
COPY_WEIGHT = 0.3
"""Weight of an answer that equals a reference it is compared with; little can be learned from it."""
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
    blends: Tensor
    """(answers,): 1 for answers that are not references, on which the blend is fitted; else 0."""


def fit_reference_judge(
    truth: Path,
    info: Path,
    references: Path | None,
    out: Path,
    *,
    seed: int = 0,
    say: Say = lambda text: None,
    model: Model | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Fit both aspects, write a folder for `load_reference_judges`, and return the report on held-out questions.

    `cache` is a folder for what the language model read, so that an interrupted fit can resume. Raises `DataError` for
    unusable files, `ConfigError` without scikit-learn.
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
    cases = [case for case in labels if not is_held_out(case.question)]
    groups = [list(group) for _, group in groupby(cases, lambda case: normalise(case.question))]
    if len(groups) < 2 * N_FOLDS:
        raise DataError(
            got=f"{len(groups)} questions to fit on ({SPLIT_RULE})",
            expected=f"at least {2 * N_FOLDS}",
            remedy="give files with more questions",
        )
    name = installed_language_model() if model is None else model.fingerprint
    lm = model or load_model(LANGUAGE_MODEL, dtype=FIT_DTYPE)
    reader = Reader(lm, sorted({min(layer, lm.n_layers) for layer in LAYERS}))
    by_hash = sorted(groups, key=lambda group: hashlib.sha256(group[0].question.encode()).hexdigest())
    moments = find_moments(reader, [group[0] for group in by_hash[:N_FOR_MOMENTS]])
    examples = []
    for number, group in enumerate(groups, 1):
        examples.append(example(reader, moments, group, labels, cache, f"{name} {lm.lm.dtype}"))
        if number % 20 == 0 or number == len(groups):
            say(f"read {number} of {len(groups)} questions")
    meta = {
        "format": CODE_VERSION,
        "layers": list(reader.layers),
        "n_networks": N_NETWORKS,
        "n_folds": N_FOLDS,
        "language_model": {"version": name, "fit_dtype": str(lm.lm.dtype)},
        "seed": seed,
        "split": SPLIT_RULE,
        **{f"{key}_sha256": sha256_of(path) for key, path in (*files.items(), ("references", file))},
        "counts": counts,
        "fit_questions": len(groups),
        "fit_pairs": len(cases),
    }
    weights = fit_all(examples, moments, meta, seed, say)
    save_weights(out, weights)
    say("measuring on held-out questions")
    judges = load_reference_judges(ASPECT_NAMES, weights=out, model=model)
    report = validate(dict(zip(ASPECT_NAMES, judges, strict=True)), files, file, say=say)
    write_card(out, report, weights.meta)
    return report


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
) -> Example:
    """Read and label the answers to one question.

    An answer that equals a reference would be trivial to judge. For three in four of them, that reference is hidden, so
    that they train the judge as other answers do. `cache` holds what the language model read; `identity` names it.
    """
    copies = [is_reference(case) for case in group]
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
        torch.where(seen[:, None], COPY_WEIGHT, 1.0) * is_known,
        torch.tensor([float(not copy) for copy in copies]),
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


def fit_all(examples: Sequence[Example], moments: Moments, meta: dict[str, Any], seed: int, say: Say) -> Weights:
    """Fit without each fold, fit the blend on the out-of-fold log-odds, then fit on all training questions."""
    raw = torch.from_numpy(np.concatenate([example.read.raw for example in examples])).float()
    standard = raw.mean(0), raw.std(0) + 1e-3
    fold = np.array([fold_of(example.question) for example in examples])
    left_out = [np.zeros((2, len(example.labels), 2)) for example in examples]  # (part, answers, aspect) each
    for number in range(N_FOLDS):
        say(f"fitting without fold {number + 1} of {N_FOLDS}")
        inside = [example for example, f in zip(examples, fold, strict=True) if f != number]
        part = fit_parts(inside, moments, standard, [seed], meta)
        for i in np.flatnonzero(fold == number).tolist():
            left_out[i] = part.log_odds(examples[i].read)
    say("fitting on all training questions")
    stack, agreement = blend(examples, left_out)
    meta = {**meta, "cross_validation": agreement}
    return fit_parts(examples, moments, standard, [seed + i for i in range(N_NETWORKS)], meta, stack)


def fold_of(question: str) -> int:
    """Fold of a question, by hash; independent of the held-out split."""
    return int(hashlib.sha256(normalise(question).encode()).hexdigest(), 16) // 5 % N_FOLDS


def fit_parts(
    examples: Sequence[Example],
    moments: Moments,
    standard: tuple[Tensor, Tensor],
    seeds: Sequence[int],
    meta: Mapping[str, Any],
    stack: np.ndarray | None = None,
) -> Weights:
    """Fit one network per seed, and trees with the first seed; `stack` is the blend, zero if not fitted yet."""
    stack = np.zeros((2, 3)) if stack is None else stack
    empty = Weights(moments, *standard, (), {}, stack, meta)
    inputs = [(example.read, empty.dense(example.read)) for example in examples]
    labels, weights = [example.labels for example in examples], [example.weights for example in examples]
    networks: tuple[Comparer, ...] = tuple(fit_network(inputs, labels, weights, seed) for seed in seeds)
    x, y, w = np.concatenate([example.read.raw for example in examples]), stacked(labels), stacked(weights)
    trees: dict[str, Trees] = {}
    for column, aspect in enumerate(ASPECT_NAMES):
        used = w[:, column] > 0
        trees[aspect] = fit_trees(x[used], y[used, column] > 0.5, w[used, column], seeds[0])
    return Weights(moments, *standard, networks, trees, stack, meta)


def blend(examples: Sequence[Example], left_out: Sequence[np.ndarray]) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit the blend: logistic regression of the labels on both parts' out-of-fold log-odds, by aspect.

    Returns the coefficients (aspects, 3) and the accuracies of the parts and the blend.
    """
    labels, weights = stacked([e.labels for e in examples]), stacked([e.weights for e in examples])
    blends = stacked([e.blends for e in examples])
    odds, stack, agreement = np.concatenate(left_out, axis=1), [], {}  # (part, answers, aspect)
    for column, aspect in enumerate(ASPECT_NAMES):
        used = (weights[:, column] > 0) & (blends > 0)
        x, y = np.column_stack([*odds[:, used, column], np.ones(used.sum())]), labels[used, column]

        def loss(s: np.ndarray, x=x, y=y) -> float:
            return float(np.mean(np.logaddexp(0, x @ s) - y * (x @ s)) + 1e-3 * np.sum(s[:2] ** 2))

        s = minimize(loss, np.array([0.5, 0.5, 0.0]), method="BFGS").x
        stack.append(s)
        parts = {"networks": x[:, 0], "trees": x[:, 1], "both": x @ s}
        agreement[aspect] = {name: round(float(np.mean((z > 0) == (y > 0.5))), 4) for name, z in parts.items()}
        agreement[aspect]["n"] = int(used.sum())
    return np.array(stack), agreement


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
        "stack": torch.from_numpy(weights.stack),
    }
    for number, network in enumerate(weights.networks):
        tensors |= {f"network.{number}.{name}": tensor for name, tensor in network.state_dict().items()}
    small = {"feature": np.int16, "left": np.uint8, "right": np.uint8}
    for aspect, trees in weights.trees.items():
        for name, array in vars(trees).items():
            tensors[f"trees.{aspect}.{name}"] = torch.from_numpy(array.astype(small.get(name, np.float32)))
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    meta = {**weights.meta, "weights_sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(folder / TENSORS, content)
    write_atomically(folder / META, (json.dumps(meta, indent=2, sort_keys=True) + "\n").encode())


def write_card(folder: Path, report: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write ``MODEL_CARD.md`` from the report on held-out questions and the record of the fit."""
    folds = ["| aspect | n | networks | trees | both |", "|---|---|---|---|---|"]
    for aspect, found in meta["cross_validation"].items():
        folds.append(f"| {aspect} | {' | '.join(str(found[key]) for key in ('n', 'networks', 'trees', 'both'))} |")
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    text = template.format(
        **meta["counts"],
        **{key: meta[key] for key in ("fit_questions", "fit_pairs", "references_sha256", "split", "n_networks")},
        layers=", ".join(map(str, meta["layers"])),
        folds="\n".join(folds),
        table=as_table(report),
        max_tokens=MAX_ANSWER_TOKENS,
    )
    write_atomically(folder / "MODEL_CARD.md", text.encode())


def main() -> None:
    """Fit a judge from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("truth", "info", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--cache", type=Path, help="folder that stores what the language model read, to resume a fit")
    parser.add_argument("--seed", type=int, default=0)
    try:
        fit_reference_judge(**vars(parser.parse_args()), say=lambda text: print(text, file=sys.stderr, flush=True))
    except LocauditError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
