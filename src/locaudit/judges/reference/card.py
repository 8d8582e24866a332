"""The model card of a fit: what it is, how it was fitted, and its held-out figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from locaudit.store import write_atomically

_PARTS = {"non_reference": "not a reference", "reference": "a reference", "all": "all"}
_TEXT = """\
# Reference judge

P(truthful) and P(informative) of a free-form answer to a question whose true and false reference answers are known.

## What it is

Frozen states of SmolLM2-135M (layers {layers}), read with the references in context; a small attention network that
compares an answer's tokens with those of the true and of the false references ({n_networks} networks, averaged);
boosted trees on word overlap and on cosines between states; and a logistic blend of both. At run time it needs torch,
transformers and numpy. Scores are made in float32.

## Data

Judge data laid out like TruthfulQA's `finetune_truth.jsonl` and `finetune_info.jsonl` (Lin et al. 2022, Apache-2.0).
None of its text is part of this package. The hashes of the files are in `judge.json`.

| | |
|---|---|
| rows in each file | {rows} |
| distinct (question, answer) pairs | {distinct_pairs} |
| of these equal to a reference of their question | {reference_pairs} |
| pairs with conflicting labels | {pairs_with_conflicting_labels} |
| questions | {questions} |
| questions left out because they have no references | {questions_without_references} |
| fit on | {fit_questions} questions, {fit_pairs} pairs |
| held out | {held_out_questions} questions, {held_out_pairs} pairs |

Repeated rows are one pair. A pair with conflicting labels has the label of most of its rows, and no label for that
aspect when they tie. SHA-256 of the references:
`{references_sha256}`.

Split, by question: {split}.

## How it was fitted and chosen

Three of four answers that are references are fitted with that reference hidden from them, so that they teach as if
they were none. The blend is fitted on left-out answers in 3 folds of questions. There, on answers that are no
references, these parts agree with the labels (accuracy in %):

{folds}

The parts, their sizes and the training were chosen by cross-validation inside the questions for fitting. Layers and
the readout behind the answer were compared before, on 50 questions drawn from all, 13 of them held out. No choice was
made on held-out figures; a fit measures the held-out questions once, at its end. Tried and left out: a question to the
model behind the answer (no better than the bare line break), linear readouts of pooled states (worse than the network).

## Held-out figures

{table}

Accuracy is at threshold 0.5; its 95 % interval resamples questions. ECE is the expected calibration error in
{bins} equal-width bins. The trees alone are {trees}.

## Limits

- It was fitted on answers of language models of the time of GPT-3 to one benchmark. Answers of another style, and
  other behaviours, are out of its distribution; nothing was measured there.
- It needs references and knows little beyond them: it compares, it does not know the world.
- It is wrong about one answer in {wrong} on truth. Compare edits only under one fixed judge, with intervals.
- An answer is read up to its first {max_tokens} tokens.

## Repeat it

    locaudit judge fit --truth FILE --info FILE --out DIR
    locaudit judge validate --truth FILE --info FILE --json
"""


def write_card(folder: Path, report: Mapping[str, Any], meta: Mapping[str, Any], *, max_tokens: int) -> None:
    """Write ``MODEL_CARD.md`` from a held-out report and what the fit recorded."""
    truth = report["aspects"]["truth"]["non_reference"]
    text = _TEXT.format(
        **meta["counts"],
        **{key: meta[key] for key in ("fit_questions", "fit_pairs", "references_sha256", "split", "n_networks")},
        layers=", ".join(map(str, meta["layers"])),
        held_out_questions=report["held_out_questions"],
        held_out_pairs=report["held_out_pairs"],
        folds=_folds(meta["cross_validation"]),
        table=held_out_table(report),
        bins=truth.get("ece_bins", 10),
        trees="right on "
        + " and ".join(
            f"{_percent(report['trees_only'][aspect]['non_reference'].get('accuracy'))} % ({aspect})"
            for aspect in ("truth", "info")
        )
        + " of the\nanswers that are no references",
        wrong=round(1 / max(1 - truth.get("accuracy", 0.0), 1e-3)),
        max_tokens=max_tokens,
    )
    write_atomically(folder / "MODEL_CARD.md", text.encode())


def held_out_table(report: Mapping[str, Any]) -> str:
    """The held-out figures as a Markdown table."""
    lines = [
        "| aspect | answer is | n | majority | accuracy (95 %) | balanced | Brier | ECE | AUC |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for aspect, parts in report["aspects"].items():
        for part, title in _PARTS.items():
            m = parts[part]
            if m["n"]:
                low, high = map(_percent, m["accuracy_95"])
                cells = (
                    aspect, title, m["n"], _percent(m["majority"]), f"{_percent(m['accuracy'])} ({low} to {high})",
                    _percent(m["balanced_accuracy"]), _decimal(m["brier"]), _decimal(m["ece"]), _decimal(m["auc"]),
                )  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _folds(agreement: Mapping[str, Mapping[str, float]]) -> str:
    lines = ["| aspect | n | networks | trees | both |", "|---|---|---|---|---|"]
    for aspect, found in agreement.items():
        shares = " | ".join(_percent(found[name]) for name in ("networks", "trees", "both"))
        lines.append(f"| {aspect} | {found['n']} | {shares} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
