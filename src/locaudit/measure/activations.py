"""Head (or neuron) activations at the last token of question-answer texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locaudit.behaviours import Question
from locaudit.edits.hooks import record
from locaudit.errors import ConfigError
from locaudit.linears import fast_linears
from locaudit.location import Kind
from locaudit.measure.forward import check_depth, collate_bank, default_row_tokens, packed_rows
from locaudit.measure.tree import Forest, additive_mask, encode_tree
from locaudit.models import Model, Site

Context = Literal["next_question", "answer"]


@dataclass(frozen=True, eq=False)
class Activations:
    """Inputs of the projections at each example's last token; an example is a question with one of its answers."""

    values: Float[Tensor, "n layers units width"]
    """float32, on the CPU."""
    is_true: Bool[Tensor, " n"]
    """Whether the answer is a true one."""
    question: Int[Tensor, " n"]
    """Number of the example's question in the list that was given."""


def collect_activations(
    model: Model,
    questions: Sequence[Question],
    *,
    context: Context = "next_question",
    kind: Kind = "heads",
    seed: int = 0,
    row_tokens: int | None = None,
) -> Activations:
    """Activations of every unit for every answer, read at the last token.

        Q: {question} A: {answer}                         context="answer"
        Q: {question} A: {answer} Q: {random question}    context="next_question" (the paper, "Localization")

    The random question is another one of `questions`, drawn anew for each answer from `seed`. All answers of a question
    share one tree, so a question's tokens run once.
    """
    if context not in ("next_question", "answer") or kind not in ("heads", "neurons") or not questions:
        raise ConfigError(
            got=f"context {context!r}, kind {kind!r} and {len(questions)} questions",
            expected="'next_question' or 'answer', 'heads' or 'neurons', and at least one question",
            remedy="change the arguments",
        )
    rng = random.Random(seed)
    trees = []
    for number, question in enumerate(questions):
        endings = []
        for answer in question.answers:
            ending = f" {answer}"
            if context == "next_question" and len(questions) > 1:
                other = rng.randrange(len(questions) - 1)
                ending += f" Q: {questions[other + (other >= number)].text}"
            endings.append(ending)
        trees.append(encode_tree(model.tokenizer, f"Q: {question.text} A:", endings))
    check_depth(model, Forest((), tuple(trees)))
    sites: list[Site] = [(kind, layer) for layer in range(model.n_layers)]
    n_units, width = model.n_units(kind), model.unit_width(kind)
    starts = torch.tensor([0, *[len(tree.branches) for tree in trees]]).cumsum(0).tolist()
    values = torch.empty(starts[-1], model.n_layers, n_units, width)
    with torch.no_grad():
        for rows in packed_rows([len(tree.read.tokens) for tree in trees], row_tokens or default_row_tokens(model)):
            batch = collate_bank([[trees[i] for i in row] for row in rows], 1, 0, model, ends=True)
            row, token = batch.last
            with fast_linears(model.lm), record(model, sites, (row, token)) as inputs:
                model.lm(
                    input_ids=batch.input_ids,
                    position_ids=batch.position_ids,
                    attention_mask=additive_mask(batch, 0, model.lm.dtype),
                    use_cache=False,
                    logits_to_keep=1,
                )
            where = torch.cat([torch.arange(starts[i], starts[i + 1]) for row in rows for i in row])
            for layer, site in enumerate(sites):
                values[where, layer] = inputs[site].cpu().view(-1, n_units, width)
    return Activations(
        values,
        torch.tensor([i < len(q.true) for q in questions for i in range(len(q.answers))]),
        torch.tensor([number for number, q in enumerate(questions) for _ in q.answers]),
    )
