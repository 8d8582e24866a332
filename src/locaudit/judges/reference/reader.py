"""Hidden states of a frozen language model that reads each answer after its question and the references.

    Question: {question}
    Correct answers:
    - {true reference}
    ...
    Incorrect answers:
    - {false reference}
    ...
    Question: {question}
    Answer: {answer}

The prompt, everything up to the last ``Answer:``, runs once per question. Its answers then run together as answer trees
(`locaudit.measure.tree`), so an answer's states do not depend on the other answers. Only the first layers of the model
run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locaudit.edits.hooks import record
from locaudit.judges.base import Case
from locaudit.location import Site
from locaudit.measure.forward import Prefix, forest_batches, run_prefix, run_trees
from locaudit.measure.tree import Forest, Tree
from locaudit.models import Model

MAX_REFERENCE_TOKENS, MAX_REFERENCES = 48, 24
"""Limits: tokens read per reference, and references read per side (true or false)."""
MAX_QUESTION_TOKENS, MAX_ANSWER_TOKENS = 128, 64
"""Limits: tokens read per question and per answer."""
PASS_TOKENS = 640
"""Answer tokens per forward pass; bounds memory."""
N_REMEMBERED = 192
"""Number of questions whose prompt states are kept in memory, about 4 MB each: the first ones. Audits judge the same
questions again and again, in the same order. If the last ones were kept, and there were more questions than this, each
would be dropped just before it comes again."""


@dataclass(frozen=True)
class Prompt:
    """A question and its references after the model has read them."""

    cache: Prefix
    """Keys and values of each layer."""
    states: Float[Tensor, "layers tokens d"]
    segment: Int[Tensor, " tokens"]
    """Number of the reference that each token belongs to, true references first; -1 if none."""
    n_true: int
    n_false: int
    tokens: tuple[int, ...]


class Reader:
    """Reads answers with a causal LM of the Llama family; records hidden states after `layers` (counted from 1)."""

    def __init__(self, model: Model, layers: Sequence[int]):
        self.layers = tuple(layers)
        self.model = _first_layers(model, max(layers))
        self._remembered: dict[tuple[Any, ...], Prompt] = {}

    def prompt(self, case: Case) -> Prompt:
        """The prompt of the case's question and references, from memory if it is one of the first `N_REMEMBERED`."""
        asked = case.question, case.true[:MAX_REFERENCES], case.false[:MAX_REFERENCES]
        if (found := self._remembered.get(asked)) is None:
            found = self._run_prompt(*asked)
            if len(self._remembered) < N_REMEMBERED:
                self._remembered[asked] = found
        return found

    @torch.no_grad()
    def read(
        self, case: Case, answers: Sequence[str], hidden: Set[int] = frozenset()
    ) -> list[Float[Tensor, "layers tokens d"]]:
        """Hidden states of each answer's tokens and of the line break after it, in order of `answers`.

        `case` gives question and references. Attention to the references whose numbers are in `hidden` is cut off.
        """
        prompt = self.prompt(case)
        # (prompt tokens,): keys and values that the answers attend to
        seen = ~torch.isin(prompt.segment, torch.tensor(sorted(hidden), dtype=prompt.segment.dtype))
        seen[-1] = False  # the prompt's last token runs again, as the root of every answer's tree
        # Per layer: keys and values (1, heads, seen tokens, head_dim)
        prefix = [
            (keys[:, :, seen.to(keys.device)], values[:, :, seen.to(keys.device)]) for keys, values in prompt.cache
        ]
        branches = [self._encode(f" {answer}", MAX_ANSWER_TOKENS) if answer else () for answer in answers]
        trees = [Tree(prompt.tokens[-1:], (branch + self._encode("\n"),)) for branch in branches]
        lengths = [len(tree.read.tokens) for tree in trees]
        out: dict[int, Tensor] = {}  # answer -> (layers, tokens, d)
        forest = Forest(prompt.tokens[:-1], tuple(trees))
        for rows, batch in forest_batches(self.model, forest, row_tokens=PASS_TOKENS, ends=True):
            found, _ = self._recorded(batch.input_ids.shape, partial(run_trees, self.model, batch, prefix=prefix))
            for row, states in zip(rows, found.unbind(1), strict=True):
                pieces = states[:, : sum(lengths[i] for i in row)].split([lengths[i] for i in row], dim=1)
                out |= {i: piece[:, 1:] for i, piece in zip(row, pieces, strict=True)}
        return [out[i] for i in range(len(answers))]

    @torch.no_grad()
    def _run_prompt(self, text: str, true: tuple[str, ...], false: tuple[str, ...]) -> Prompt:
        """Run the prompt, made of pieces of text: (text, number of the reference or -1)."""
        question = self.model.tokenizer.decode(list(self._encode(text, MAX_QUESTION_TOKENS)))
        pieces = [(f"Question: {question}\nCorrect answers:", -1)]
        listed = [[("\n-", -1), (f" {reference}", number)] for number, reference in enumerate(true + false)]
        pieces += chain(*listed[: len(true)], [("\nIncorrect answers:", -1)], *listed[len(true) :])
        pieces.append((f"\nQuestion: {question}\nAnswer:", -1))
        ids, segment = [], []
        for text, owner in pieces:
            tokens = self._encode(text, MAX_REFERENCE_TOKENS if owner >= 0 else None)
            ids += tokens
            segment += [owner] * len(tokens)
        states, cache = self._recorded((1, len(ids)), partial(run_prefix, self.model, ids, None))
        return Prompt(cache or [], states[:, 0], torch.tensor(segment), len(true), len(false), tuple(ids))

    def _recorded(
        self, shape: Sequence[int], forward: Callable[[], Any]
    ) -> tuple[Float[Tensor, "layers rows tokens d"], Any]:
        """Residual stream after each of `layers` in a forward of `shape` (rows, tokens), and what it returns."""
        sites = [Site("residual", number - 1) for number in self.layers]
        row, token = torch.ones(*shape).nonzero(as_tuple=True)  # every position
        with record(self.model, sites, (row, token)) as found:
            out = forward()
        # Rounded to half precision, as the fit stored them, so that the judge sees the same numbers.
        return torch.stack([found[site] for site in sites]).unflatten(1, tuple(shape)).half().float().cpu(), out

    def _encode(self, text: str, limit: int | None = None) -> tuple[int, ...]:
        return tuple(self.model.tokenizer(text, add_special_tokens=False)["input_ids"][:limit]) if text else ()


def _first_layers(model: Model, n: int) -> Model:
    """A copy of the model with only its first n layers and no final norm; the weights are shared.

    The model was checked as a whole. Its first layers alone need not pass: without the norm, logits magnify rounding.
    """
    shared: dict[int, Any] = {id(weight): weight for weight in model.lm.parameters()}
    lm: Any = copy.deepcopy(model.lm, shared)
    lm.config.num_hidden_layers = n
    lm.base_model.layers, lm.base_model.norm = lm.base_model.layers[:n], nn.Identity()
    out = replace(model, lm=lm)
    _ = out.head  # computed now, while no state is recorded
    return out
