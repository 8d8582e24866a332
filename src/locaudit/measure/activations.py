"""Activations of heads (or other units) at the last token of question-answer texts, for probes and ITI."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt
from locaudit.edits.hooks import record
from locaudit.errors import ConfigError, ModelError
from locaudit.location import Site
from locaudit.measure.forward import check_depth, forest_batches, run_trees
from locaudit.measure.tree import Forest, encode_tree
from locaudit.models import Model
from locaudit.registry import KINDS

Context = Literal["next_question", "answer"]


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of every unit for n examples. An example is a question with one of its answers.

    Activations are read at the example's last token. For heads and neurons, they are the input of the projection; for
    the residual stream, the layer's output.
    """

    values: Float[Tensor, "n layers units width"]
    """Activations of every example and unit: `width` coordinates each, float32, on the CPU."""
    is_true: Bool[Tensor, " n"]
    """Whether the example's answer is true."""
    question: Int[Tensor, " n"]
    """Index of the example's question in the list of questions."""

    def exchange(self, chosen: Sequence[bool]) -> Activations:
        """The same activations with true and false answers exchanged at the `chosen` questions."""
        return replace(self, is_true=self.is_true ^ torch.tensor(chosen)[self.question])


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
    """Read the activations of every unit of a kind at the last token of every question-answer text.

        Q: {question} A: {answer}                         context="answer"
        Q: {question} A: {answer} Q: {random question}    context="next_question" (the paper, "Localization")

    All answers to a question are followed by the same random question of the list, as in ITI's code. The draw depends
    only on `seed` and the texts, so that the order of questions and answers does not matter. `prompt` sets the format
    of the text (None: the format shown above). In style ``chat``, questions and answers are turns of the tokenizer's
    template (`locaudit.behaviours.format`). All answers to a question share one tree, so that the question's tokens run
    once.

    Raises `ConfigError` for a kind whose units are not blocks of coordinates. Raises `ModelError` if a text does not
    fit the context, if this kind's site cannot be used in the model, or if an activation is NaN or infinite.
    """
    model.check_kind(kind)
    blocks = KINDS[kind].blocks(model.shape)
    if context not in ("next_question", "answer") or blocks is None or not questions:
        raise ConfigError(
            got=f"context {context!r}, kind {kind!r} and {len(questions)} questions",
            expected="'next_question' or 'answer', a kind whose units are blocks of coordinates, at least one question",
            remedy="correct whichever of them is wrong",
        )
    prompt, asked, trees = prompt or Prompt(), sorted(question.text for question in questions), []
    for question in questions:
        others, following = [text for text in asked if text != question.text], None
        if context == "next_question" and others:
            following = random.Random(f"{seed} {question.text}").choice(others)
        endings = [(answer, following) for answer in question.answers]
        text, said = prompt.probe(question.text, endings, model.tokenizer)
        trees.append(encode_tree(model.tokenizer, text, said, special=prompt.adds_special_tokens))
    forest = Forest((), tuple(trees))
    check_depth(model, forest)
    sites = [Site(KINDS[kind].site, layer) for layer in range(model.n_layers)]
    n_units, width = blocks
    starts = torch.tensor([0, *[len(tree.branches) for tree in trees]]).cumsum(0).tolist()
    values = torch.empty(starts[-1], model.n_layers, n_units, width)
    _ = model.head  # finding the head runs a forward, which must not happen while activations are recorded
    with torch.no_grad():
        for rows, batch in forest_batches(model, forest, row_tokens=row_tokens, ends=True):
            row, token = batch.last  # each answer's last token: (answers,) each
            with record(model, sites, (row, token)) as inputs:
                run_trees(model, batch)
            # Examples are numbered by question, then answer; rows hold the questions in another order.
            where = torch.cat([torch.arange(starts[i], starts[i + 1]) for row in rows for i in row])
            for layer, site in enumerate(sites):
                values[where, layer] = inputs[site].cpu().view(-1, n_units, width)  # from (answers, units x width)
    found = Activations(
        values,
        torch.tensor([i < len(q.true) for q in questions for i in range(len(q.answers))]),
        torch.tensor([number for number, q in enumerate(questions) for _ in q.answers]),
    )
    check_finite(found)
    return found


def check_finite(activations: Activations) -> None:
    """Raise `ModelError` if an activation is NaN or infinite. It names the lowest such layer and its first question."""
    broken = ~activations.values.isfinite().flatten(2).all(dim=2)  # (n, layers)
    if broken.any():
        layer, example = (int(x) for x in broken.T.nonzero()[0])
        raise ModelError(
            got=f"activations that are not finite, in layer {layer}, for an answer to question "
            f"{int(activations.question[example])} (counted from 0)",
            expected="finite numbers",
            remedy="check the model's weights, or load it in float32 (loading.dtype)",
        )
