"""Answer trees: all answers of a question are scored in one row of a batch.

Tokens that answers share run once. These are the prompt and any beginning that several answers have in common. Position
ids and the attention mask give every answer the same context as in a row of its own, so that its log-probability is the
same.

Example: the prompt "Was it ?" with the answers "No , never", "No , it is" and "Yes it is", with one token per word.

                      +-- No -- , --+-- [never]
    Was -- it -- ? ---+             +-- it -- [is]
                      +-- Yes -- it -- [is]

The last token of an answer (in brackets) is predicted, but nothing is predicted from it. Therefore it gets no column.
The row has 8 columns; with one row per answer, there would be 3 rows of up to 5 columns.

    column        0    1    2    3    4    5    6    7
    token         Was  it   ?    No   ,    it   Yes  it
    position id   0    1    2    3    4    5    3    4       along the token's own path
    parent        -1   0    1    2    3    4    2    6       column of the token before it on its path
    predicts                No   ,    never is  it   is
                            Yes       it

    mask (row: query column, column: key column; 1 = may attend)

        Was   1 . . . . . . .
        it    1 1 . . . . . .
        ?     1 1 1 . . . . .
        No    1 1 1 1 . . . .
        ,     1 1 1 1 1 . . .
        it    1 1 1 1 1 1 . .
        Yes   1 1 1 . . . 1 .       the prompt and itself, but not the answers that begin with "No"
        it    1 1 1 . . . 1 1

`Layout.edges` lists the 8 predictions as (column, token): 0 (2, No), 1 (3, ","), 2 (4, never), 3 (4, it), 4 (5, is),
5 (2, Yes), 6 (6, it), 7 (7, is). `Layout.paths` lists the predictions of each answer: (0, 1, 2), (0, 1, 3, 4) and
(5, 6, 7). So log p("No , it is") is the sum of the log-probabilities of predictions 0, 1, 3 and 4.

Several trees can be side by side in one row. Positions then start again with each tree, and the mask is block-diagonal.
If P tokens come before the row from a cache (the prefix), P is added to every position id, and every token attends to
the whole prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locaudit.behaviours.format import Prompt
from locaudit.errors import DataError
from locaudit.location import ROLES


@dataclass(frozen=True)
class Layout:
    """The columns of one tree: the prompt, then the answers' tokens. A beginning that answers share is there once.

    Every column comes after its parent, the column of the token before it.
    """

    tokens: tuple[int, ...]
    """Token id of each column."""
    positions: tuple[int, ...]
    """Position id of each column, from 0: the number of tokens before it on its path."""
    parents: tuple[int, ...]
    """For each column, the column of the token before it on its path; -1 for the first token of the prompt."""
    edges: tuple[tuple[int, int], ...]
    """(predicting column, predicted token id) of each prediction. If branches share a prediction, it is listed once."""
    paths: tuple[tuple[int, ...], ...]
    """For each branch, the indices in `edges` of the predictions of its tokens, in order."""
    last: tuple[int, ...]
    """Column of each branch's last token; -1 if that token has no column."""


@dataclass(frozen=True)
class Tree:
    """Token ids of a prompt and of the branches (answers) that may follow it."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    subject: int | None = None
    """Index in the prompt of the last token of the question's subject; None without one."""

    @property
    def mark(self) -> tuple[int, ...]:
        """What identities of edits and measurements have besides the tokens: the subject, if there is one."""
        return () if self.subject is None else (self.subject,)

    def __len__(self) -> int:
        """Number of columns of `scored`."""
        return len(self.scored.tokens)

    @cached_property
    def scored(self) -> Layout:
        """The columns needed to score the branches: all tokens except those from which nothing is predicted."""
        return _lay_out(self, ends=False)

    @cached_property
    def read(self) -> Layout:
        """A column for every token, so that activations can be read at each branch's last token."""
        return _lay_out(self, ends=True)


@dataclass(frozen=True)
class Forest:
    """Trees whose prompts all begin with the same tokens, such as a primer. Only `prefix` has these tokens."""

    prefix: tuple[int, ...]
    trees: tuple[Tree, ...]

    @property
    def depth(self) -> int:
        """Length in tokens of the longest path: prefix, prompt and branch."""
        return len(self.prefix) + max(len(tree.prompt) + max(map(len, tree.branches)) for tree in self.trees)

    @property
    def n_tokens(self) -> int:
        """Number of columns of all trees, without the prefix."""
        return sum(map(len, self.trees))


@dataclass(frozen=True)
class TreeBatch:
    """Rows of one or more trees side by side, right-padded to one length: the tensors of one forward pass."""

    input_ids: Int[Tensor, "rows tokens"]
    position_ids: Int[Tensor, "rows tokens"]
    visible: Bool[Tensor, "rows tokens tokens"]
    """Attention mask: in row r, the token in column i may attend to the one in column j if ``visible[r, i, j]``."""
    roles: Int[Tensor, "rows tokens"]
    """The role of each token (`locaudit.location.ROLES`), which decides whether an edit acts on it; 0 at padding."""
    target: Int[Tensor, "3 n"]
    """(row, predicting column, predicted token id) of each of the n predictions. Branches can share predictions."""
    path: Int[Tensor, "2 steps"]
    """(branch, index in `target`) of every token of every branch. Branches are numbered across all rows."""
    last: Int[Tensor, "2 branches"]
    """(row, column) of each branch's last token; the column is -1 if that token does not run."""

    @property
    def n_branches(self) -> int:
        """Number of branches in all rows."""
        return self.last.shape[1]

    @property
    def lengths(self) -> Int[Tensor, " branches"]:
        """Length of each branch in tokens."""
        return torch.bincount(self.path[0], minlength=self.n_branches)


def encode_tree(tokenizer: Any, prompt: str, continuations: Sequence[str], *, special: bool = True) -> Tree:
    """Tokenise a prompt and its continuations into a tree.

    Each continuation is tokenised together with the prompt. If the tokenizer merges characters of both into one token,
    the result does not begin with the prompt's own tokens, and the continuation is tokenised alone. `special` adds the
    tokenizer's special tokens (BOS). Raises `DataError` for a prompt or continuation without tokens.
    """
    ending = added_tokens(tokenizer)[1] if special else ()

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
                got=f"the prompt or answer {text!r} without tokens", expected="at least one token", remedy="remove it"
            )
    return Tree(head, tuple(branches))


def added_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that the tokenizer puts before every text (BOS) and after it (T5-like tokenizers append EOS).

    Tokens after the text are not scored.
    """
    plain = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = tuple(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    return ((), ()) if at is None else (full[:at], full[at + len(plain) :])


def plant(
    tokenizer: Any, prompt: Prompt, questions: Sequence[tuple[str, Sequence[str]]], subjects: Sequence[str] = ()
) -> Forest:
    """Tokenise (question, answers) pairs into a forest. `subjects` has each question's subject, empty without one.

    If there is a primer, the tokens with which all prompts begin become the forest's prefix. Otherwise, the prefix is
    empty.
    """

    def tree_of(question: str, answers: Sequence[str], subject: str = "") -> Tree:
        text, endings = prompt.answered(question, answers, tokenizer)
        tree = encode_tree(tokenizer, text, endings, special=prompt.adds_special_tokens)
        if not subject:
            return tree
        at = find_subject(tokenizer, text, question, subject, special=prompt.adds_special_tokens)
        return replace(tree, subject=at)

    marked = subjects or [""] * len(questions)
    trees = [tree_of(*pair, subject) for pair, subject in zip(questions, marked, strict=True)]
    if not prompt.primer:
        return Forest((), tuple(trees))
    # A few questions may all begin with the same words. Two more prompts keep such words out of the prefix.
    # `prompt[:-1]` leaves each tree at least one prompt token, from which the first answer token is predicted.
    others = [tree_of(text, ()).prompt for text in ("?", "Why not?")]
    n = len(commonprefix([*others, *(tree.prompt[:-1] for tree in trees)]))
    shorter = [
        replace(tree, prompt=tree.prompt[n:], subject=None if tree.subject is None else tree.subject - n)
        for tree in trees
    ]
    return Forest(trees[0].prompt[:n], tuple(shorter))


def find_subject(tokenizer: Any, prompt: str, question: str, subject: str, *, special: bool) -> int:
    """Index of the prompt's token with the last character of `subject`, where it first occurs in the question.

    Raises `DataError` if the prompt does not contain the question as it is, or the tokenizer gives no offsets.
    """
    start = prompt.rfind(question)
    if start < 0 or not tokenizer.is_fast:
        raise DataError(
            got=f"the subject {subject!r} in a prompt without the words {question[:60]!r}"
            if start < 0
            else f"the subject {subject!r} with a tokenizer that does not say which characters a token has",
            expected="a prompt with the question as it is, and a fast tokenizer",
            remedy="choose another prompt.style, or other positions than subject",
        )
    end = start + question.index(subject) + len(subject)
    spans = tokenizer(prompt, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (first, after) in enumerate(spans) if first < end and after > first)


def collate(
    rows: Sequence[Sequence[Tree]], *, n_prefix: int = 0, pad_id: int = 0, ends: bool = False, multiple: int = 1
) -> TreeBatch:
    """Put trees into the rows of a batch. ``rows[r]`` are the trees of row r; trees do not attend to each other.

    Position ids start at `n_prefix`. Rows are padded to the length of the longest one, rounded up to a multiple of
    `multiple`. A padding token attends only to itself, and no other token attends to it. With `ends`, the branches'
    last tokens get columns too (`Tree.read`).
    """
    layouts = [[tree.read if ends else tree.scored for tree in row] for row in rows]
    n_rows, n_tokens = len(rows), max(sum(len(layout.tokens) for layout in row) for row in layouts)
    n_tokens = -(-n_tokens // multiple) * multiple
    input_ids = np.full((n_rows, n_tokens), pad_id)
    position_ids = np.zeros((n_rows, n_tokens), dtype=np.int64)
    visible = np.broadcast_to(np.eye(n_tokens, dtype=bool), (n_rows, n_tokens, n_tokens)).copy()
    roles = np.zeros((n_rows, n_tokens), dtype=np.int64)
    targets: list[tuple[int, int, int]] = []
    steps: list[tuple[int, int]] = []
    last: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        at = 0  # first column of the next tree
        for tree, layout in zip(row, layouts[number], strict=True):
            end = at + len(layout.tokens)
            input_ids[number, at:end] = layout.tokens
            position_ids[number, at:end] = layout.positions
            last_column = at + len(tree.prompt) - 1
            roles[number, at : last_column + 1] = ROLES["prompt"]
            roles[number, last_column:end] += ROLES["answer"]
            roles[number, last_column] += ROLES["last"]
            if tree.subject is not None:
                roles[number, at + tree.subject] += ROLES["subject"]
            # Each token attends to itself (the diagonal) and to what its parent attends to. Parents come first.
            for column in range(1, len(layout.tokens)):
                visible[number, at + column] |= visible[number, at + layout.parents[column]]
            # Branches and targets are numbered across rows: shift this tree's numbers by those already there.
            steps += [(len(last) + b, len(targets) + edge) for b, path in enumerate(layout.paths) for edge in path]
            targets += [(number, at + column, token) for column, token in layout.edges]
            last += [(number, at + column if column >= 0 else -1) for column in layout.last]
            at = end
    return TreeBatch(
        torch.from_numpy(input_ids),  # (rows, tokens)
        torch.from_numpy(position_ids) + n_prefix,  # (rows, tokens)
        torch.from_numpy(visible),  # (rows, tokens, tokens)
        torch.from_numpy(roles),  # (rows, tokens)
        torch.tensor(targets).T,  # (3, predictions)
        torch.tensor(steps).T,  # (2, tokens of all branches)
        torch.tensor(last).T,  # (2, branches)
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items over rows of at most `capacity` tokens. Returns the item numbers of each row.

    This is first-fit decreasing: the longest item comes first, and each item goes into the first row with room for it.
    An item longer than `capacity` gets a row of its own. ``pack([7, 3, 5, 2], 8)`` is ``[[0], [2, 1], [3]]``.
    """
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
    """Columns of a tree. With `ends`, the branches' last tokens get columns too."""
    n_prompt = len(tree.prompt)
    tokens, positions, parents = list(tree.prompt), list(range(n_prompt)), list(range(-1, n_prompt - 1))
    # Two branches have the same edge (predicting column, token) exactly if they agree up to and including that token.
    columns: dict[tuple[int, int], int] = {}  # edge -> column of its token, if it has one
    edges: dict[tuple[int, int], int] = {}  # edge -> its index, in order of first use
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
            column = columns.get(edge, -1)  # -1 only at the branch's last token
        paths.append(tuple(path))
        last.append(column)
    return Layout(tuple(tokens), tuple(positions), tuple(parents), tuple(edges), tuple(paths), tuple(last))


def additive_mask(batch: TreeBatch, n_prefix: int, dtype: torch.dtype) -> Float[Tensor, "rows 1 tokens seen"]:
    """The mask that transformers adds to attention scores, for a batch that comes after `n_prefix` cached tokens.

    It is 0 where a token may attend, and the dtype's minimum elsewhere. Its last dimension covers the prefix and the
    row: P + tokens.
    """
    rows, tokens = batch.input_ids.shape
    # Every token attends to the whole prefix: (rows, tokens, P) ones, then (rows, tokens, tokens).
    visible = torch.cat([batch.visible.new_ones(rows, tokens, n_prefix), batch.visible], dim=2)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
