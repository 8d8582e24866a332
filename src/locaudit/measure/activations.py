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
from locaudit.behaviours.format import Prompt
from locaudit.edits.hooks import record
from locaudit.errors import ConfigError
from locaudit.location import Site
from locaudit.measure.forward import check_depth, forest_batches, run_trees
from locaudit.measure.tree import Forest, encode_tree
from locaudit.models import Model
from locaudit.registry import KINDS

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
    kind: str = "head",
    prompt: Prompt | None = None,
    seed: int = 0,
    row_tokens: int | None = None,
) -> Activations:
    """Activations of every unit for every answer, read at the last token.

        Q: {question} A: {answer}                         context="answer"
        Q: {question} A: {answer} Q: {random question}    context="next_question" (the paper, "Localization")

    The random question is another one of `questions`, drawn anew for each answer from `seed`. All answers of a question
    share one tree, so a question's tokens run once. `prompt` (None: the above) gives the texts: in style ``chat``,
    questions and answers are turns of the tokenizer's template (`locaudit.behaviours.format`).
    """
    blocks = KINDS[kind].blocks(model.shape)
    if context not in ("next_question", "answer") or blocks is None or not questions:
        raise ConfigError(
            got=f"context {context!r}, kind {kind!r} and {len(questions)} questions",
            expected="'next_question' or 'answer', a kind whose units are blocks of coordinates, at least one question",
            remedy="change the arguments",
        )
    prompt, rng = prompt or Prompt(), random.Random(seed)
    trees = []
    for number, question in enumerate(questions):
        endings = []
        for answer in question.answers:
            following = None
            if context == "next_question" and len(questions) > 1:
                other = rng.randrange(len(questions) - 1)
                following = questions[other + (other >= number)].text
            endings.append((answer, following))
        text, said = prompt.probe(question.text, endings, model.tokenizer)
        trees.append(encode_tree(model.tokenizer, text, said, special=prompt.adds_special_tokens))
    forest = Forest((), tuple(trees))
    check_depth(model, forest)
    sites = [Site(KINDS[kind].site, layer) for layer in range(model.n_layers)]
    n_units, width = blocks
    starts = torch.tensor([0, *[len(tree.branches) for tree in trees]]).cumsum(0).tolist()
    values = torch.empty(starts[-1], model.n_layers, n_units, width)
    _ = model.head  # looked at now, when nothing is recorded
    with torch.no_grad():
        for rows, batch in forest_batches(model, forest, row_tokens=row_tokens, ends=True):
            row, token = batch.last
            with record(model, sites, (row, token)) as inputs:
                run_trees(model, batch)
            where = torch.cat([torch.arange(starts[i], starts[i + 1]) for row in rows for i in row])
            for layer, site in enumerate(sites):
                values[where, layer] = inputs[site].cpu().view(-1, n_units, width)
    return Activations(
        values,
        torch.tensor([i < len(q.true) for q in questions for i in range(len(q.answers))]),
        torch.tensor([number for number, q in enumerate(questions) for _ in q.answers]),
    )
