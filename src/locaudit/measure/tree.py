"""Answer trees: all answers of a question in one row.

    answers    No, it is.   No, never.   Yes.
    tokens     q q q | No , it is never Yes        the last token of an answer predicts nothing: it is not run
    positions  0 1 2 | 3  4 5  6  5     3

The question stands once, and so do the tokens that answers begin with in common. Position ids count along each path
from the question on, and the mask lets a token see its own path only, so every answer is computed as if it stood alone
in its row. Several trees fill a row in the same way, so that hardly any padding runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locaudit.behaviours.format import Prompt
from locaudit.errors import DataError


@dataclass(frozen=True)
class Layout:
    """One row: the prompt, then each distinct beginning of a branch once, parents before children."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    """Of each token on its path, from 0."""
    parents: tuple[int, ...]
    """Column of the token before it on its path; -1 for the first."""
    edges: tuple[tuple[int, int], ...]
    """(column that predicts it, token): each predicted token of the branches, once."""
    paths: tuple[tuple[int, ...], ...]
    """Edges of each branch."""
    last: tuple[int, ...]
    """Column of each branch's last token; -1 where it does not run."""


@dataclass(frozen=True)
class Tree:
    """Token ids of one prompt and of the branches that follow it."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        """Tokens that run when the branches are scored."""
        return len(self.scored.tokens)

    @cached_property
    def scored(self) -> Layout:
        """The row in which the branches' tokens are predicted: without those that predict nothing themselves."""
        return _lay_out(self, ends=False)

    @cached_property
    def read(self) -> Layout:
        """The row with every token, for what is read at the branches' ends."""
        return _lay_out(self, ends=True)


@dataclass(frozen=True)
class Forest:
    """Trees of several prompts that begin with the same `prefix` (such as a primer), which they leave out."""

    prefix: tuple[int, ...]
    trees: tuple[Tree, ...]

    @property
    def depth(self) -> int:
        """Tokens of the longest path, prefix included."""
        return len(self.prefix) + max(len(tree.prompt) + max(map(len, tree.branches)) for tree in self.trees)

    @property
    def n_tokens(self) -> int:
        """Tokens of all trees, without the prefix."""
        return sum(map(len, self.trees))


@dataclass(frozen=True)
class TreeBatch:
    """Right-padded rows of one or more trees."""

    input_ids: Int[Tensor, "rows tokens"]
    position_ids: Int[Tensor, "rows tokens"]
    visible: Bool[Tensor, "rows tokens tokens"]
    """visible[r, i, j]: token i of row r may attend to token j."""
    answer_positions: Bool[Tensor, "rows tokens"]
    """From the last prompt token on: every token that an answer's probability is read from."""
    target: Int[Tensor, "3 n"]
    """(row, column that predicts it, token id) of each predicted token; what branches share is there once."""
    path: Int[Tensor, "2 steps"]
    """(branch, its target): every token of every branch, branches counted through all rows."""
    last: Int[Tensor, "2 branches"]
    """(row, column) of each branch's last token; the column is -1 where it does not run."""

    @property
    def n_branches(self) -> int:
        """Branches of all rows."""
        return self.last.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " branches"]:
        """Tokens of each branch."""
        return torch.bincount(self.path[0], minlength=self.n_branches)


def encode_tree(tokenizer: Any, prompt: str, continuations: Sequence[str], *, special: bool = True) -> Tree:
    """Tokenise a prompt and its continuations so that the continuations' tokens are known by construction.

    Prompt and continuation are tokenised together; where that does not begin with the prompt's own tokens (the
    tokenizer merged across the border), the continuation is tokenised alone.
    """
    ending = _ending(tokenizer) if special else ()

    def encode(text: str) -> tuple[int, ...]:
        ids = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
        return ids[: -len(ending)] if ending and ids[-len(ending) :] == ending else ids

    head, branches = encode(prompt), []
    for text in continuations:
        joint = encode(prompt + text)
        if joint[: len(head)] == head and joint != head:
            branches.append(joint[len(head) :])
        else:
            branches.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    for text, ids in zip([prompt, *continuations], [head, *branches], strict=True):
        if not ids:
            raise DataError(
                got=f"the prompt or answer {text!r} without tokens", expected="at least one token", remedy="drop it"
            )
    return Tree(head, tuple(branches))


def _ending(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts after every text (T5-like tokenizers add EOS); they are not scored."""
    plain = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = tuple(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    return () if at is None else full[at + len(plain) :]


def plant(tokenizer: Any, prompt: Prompt, questions: Sequence[tuple[str, Sequence[str]]]) -> Forest:
    """A forest of (question, answers), with the tokens that all prompts share as its prefix."""

    def tree_of(question: str, answers: Sequence[str]) -> Tree:
        text, endings = prompt.render(question, tokenizer), [prompt.joint + answer for answer in answers]
        return encode_tree(tokenizer, text, endings, special=prompt.adds_special_tokens)

    trees = [tree_of(question, answers) for question, answers in questions]
    if not prompt.primer:
        return Forest((), tuple(trees))
    # Two more prompts keep a chance resemblance of few questions out of the prefix, which leaves each prompt a token.
    others = [tree_of(text, ()).prompt for text in ("?", "Why not?")]
    n = len(commonprefix([*others, *(tree.prompt[:-1] for tree in trees)]))
    return Forest(trees[0].prompt[:n], tuple(Tree(tree.prompt[n:], tree.branches) for tree in trees))


def collate(
    rows: Sequence[Sequence[Tree]], *, n_prefix: int = 0, pad_id: int = 0, ends: bool = False, multiple: int = 1
) -> TreeBatch:
    """Rows of trees as a batch whose positions start at `n_prefix`; trees of one row do not see each other.

    Rows are padded to the longest, and that to a multiple of `multiple`. Padding sees only itself and is seen by
    nothing. `ends` runs the branches' last tokens too, which nothing is predicted from.
    """
    layouts = [[tree.read if ends else tree.scored for tree in row] for row in rows]
    n_rows, n_tokens = len(rows), max(sum(len(layout.tokens) for layout in row) for row in layouts)
    n_tokens = -(-n_tokens // multiple) * multiple
    input_ids = np.full((n_rows, n_tokens), pad_id)
    position_ids = np.zeros((n_rows, n_tokens), dtype=np.int64)
    visible = np.broadcast_to(np.eye(n_tokens, dtype=bool), (n_rows, n_tokens, n_tokens)).copy()
    answers = np.zeros((n_rows, n_tokens), dtype=bool)
    targets: list[tuple[int, int, int]] = []
    steps: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        at = 0
        for tree, layout in zip(row, layouts[number], strict=True):
            end = at + len(layout.tokens)
            input_ids[number, at:end] = layout.tokens
            position_ids[number, at:end] = layout.positions
            answers[number, at + len(tree.prompt) - 1 : end] = True
            for column in range(1, len(layout.tokens)):
                visible[number, at + column] |= visible[number, at + layout.parents[column]]
            steps += [(len(last) + b, len(targets) + edge) for b, path in enumerate(layout.paths) for edge in path]
            targets += [(number, at + column, token) for column, token in layout.edges]
            last += [(number, at + column if column >= 0 else -1) for column in layout.last]
            at = end
    return TreeBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids) + n_prefix,
        torch.from_numpy(visible),
        torch.from_numpy(answers),
        torch.tensor(targets).T,
        torch.tensor(steps).T,
        torch.tensor(last).T,
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of the items that share a row: each row at most `capacity` tokens, or a single item; longest first."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, room in enumerate(left) if room >= lengths[i]), None)
        if row is None:
            rows.append([i])
            left.append(capacity - lengths[i])
        else:
            rows[row].append(i)
            left[row] -= lengths[i]
    return rows


def _lay_out(tree: Tree, *, ends: bool) -> Layout:
    n_prompt = len(tree.prompt)
    tokens, positions, parents = list(tree.prompt), list(range(n_prompt)), list(range(-1, n_prompt - 1))
    columns: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], int] = {}
    paths, last = [], []
    for branch in tree.branches:
        column, path = n_prompt - 1, []
        for i, token in enumerate(branch):
            edge = (column, token)
            path.append(edges.setdefault(edge, len(edges)))
            if edge not in columns and (ends or i < len(branch) - 1):
                columns[edge] = len(tokens)
                tokens.append(token)
                positions.append(positions[column] + 1)
                parents.append(column)
            column = columns.get(edge, -1)
        paths.append(tuple(path))
        last.append(column)
    return Layout(tuple(tokens), tuple(positions), tuple(parents), tuple(edges), tuple(paths), tuple(last))


def additive_mask(batch: TreeBatch, n_prefix: int, dtype: torch.dtype) -> Float[Tensor, "rows 1 tokens seen"]:
    """The 4-D mask of a batch behind `n_prefix` cached tokens: 0 where visible, the dtype's minimum elsewhere."""
    rows, tokens = batch.input_ids.shape
    visible = torch.cat([batch.visible.new_ones(rows, tokens, n_prefix), batch.visible], dim=2)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
