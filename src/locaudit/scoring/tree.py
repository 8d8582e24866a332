"""Answer trees: all answers of a question in one row.

    tokens     q q q | a a a | b b | c c c c
    positions  0 1 2 | 3 4 5 | 3 4 | 3 4 5 6

The question stands once and each answer is a branch. Position ids restart after the question, and the mask lets a
branch see the question and itself, so every branch is computed as if it stood alone in its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from locaudit.data.prompts import Prompt
from locaudit.errors import DataError


@dataclass(frozen=True)
class Tree:
    """Token ids of one prompt and of the branches that follow it."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))

    @property
    def depth(self) -> int:
        """Tokens of the longest path."""
        return len(self.prompt) + max(map(len, self.branches))


@dataclass(frozen=True)
class Forest:
    """Trees of several prompts that begin with the same `prefix` (such as a primer), which they leave out."""

    prefix: tuple[int, ...]
    trees: tuple[Tree, ...]

    @property
    def depth(self) -> int:
        """Tokens of the longest path, prefix included."""
        return len(self.prefix) + max(tree.depth for tree in self.trees)

    @property
    def n_tokens(self) -> int:
        """Tokens of all trees, without the prefix."""
        return sum(map(len, self.trees))


@dataclass(frozen=True)
class TreeBatch:
    """Trees as right-padded rows."""

    input_ids: Int[Tensor, "rows tokens"]
    position_ids: Int[Tensor, "rows tokens"]
    visible: Bool[Tensor, "rows tokens tokens"]
    """visible[r, i, j]: token i of row r may attend to token j."""
    answer_positions: Bool[Tensor, "rows tokens"]
    """From the last prompt token on: every token that an answer's probability is read from."""
    target: Int[Tensor, "3 n"]
    """(row, token that predicts it, token id) of each answer token."""
    target_branch: Int[Tensor, " n"]
    """Branch of each answer token, counted through all rows."""
    last: Int[Tensor, "2 branches"]
    """(row, token) of each branch's last token."""

    @property
    def n_branches(self) -> int:
        """Branches of all rows."""
        return self.last.shape[1]


def encode_tree(tokenizer: Any, prompt: str, continuations: Sequence[str], *, special: bool = True) -> Tree:
    """Tokenise a prompt and its continuations so that the continuations' tokens are known by construction.

    Prompt and continuation are tokenised together; where that does not begin with the prompt's own tokens (the
    tokenizer merged across the border), the continuation is tokenised alone.
    """
    head = tuple(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    if not head:
        raise DataError(
            got=f"the prompt {prompt!r} without tokens", expected="at least one token", remedy="use a longer prompt"
        )
    branches = []
    for text in continuations:
        joint = tuple(tokenizer(prompt + text, add_special_tokens=special)["input_ids"])
        ending = _ending(tokenizer) if special else ()
        joint = joint[: len(joint) - len(ending)] if ending and joint[-len(ending) :] == ending else joint
        start = head[: len(head) - len(ending)] if ending and head[-len(ending) :] == ending else head
        if joint[: len(start)] == start and len(joint) > len(start):
            branches.append(joint[len(start) :])
        else:
            branches.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        if not branches[-1]:
            raise DataError(
                got=f"the answer {text!r} without tokens", expected="at least one token", remedy="drop the answer"
            )
    ending = _ending(tokenizer) if special else ()
    head = head[: len(head) - len(ending)] if ending and head[-len(ending) :] == ending else head
    return Tree(head, tuple(branches))


def _ending(tokenizer: Any) -> tuple[int, ...]:
    """Special tokens that the tokenizer puts after every text (T5-like tokenizers add EOS); they are not scored."""
    plain = tuple(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = tuple(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
    return () if at is None else full[at + len(plain) :]


def plant(tokenizer: Any, prompt: Prompt, questions: Sequence[tuple[str, Sequence[str]]]) -> Forest:
    """A forest of (question, answers), with the tokens that all prompts share as its prefix."""
    trees = [
        encode_tree(
            tokenizer,
            prompt.render(question, tokenizer),
            [prompt.joint + answer for answer in answers],
            special=prompt.adds_special_tokens,
        )
        for question, answers in questions
    ]
    if not prompt.primer:
        return Forest((), tuple(trees))
    # Two more prompts keep a chance resemblance of few questions out of the prefix.
    others = [
        tokenizer(prompt.render(text, tokenizer), add_special_tokens=prompt.adds_special_tokens)["input_ids"]
        for text in ("?", "Why not?")
    ]
    n = _n_common([tree.prompt[:-1] for tree in trees] + [tuple(ids) for ids in others])
    return Forest(trees[0].prompt[:n], tuple(Tree(tree.prompt[n:], tree.branches) for tree in trees))


def _n_common(rows: Sequence[Sequence[int]]) -> int:
    n = min(map(len, rows))
    return next((i for i in range(n) if len({row[i] for row in rows}) > 1), n)


def collate(trees: Sequence[Tree], *, n_prefix: int = 0, pad_id: int = 0) -> TreeBatch:
    """Trees as a batch whose positions start at `n_prefix`. Padding sees only itself and is seen by nothing."""
    n_rows, n_tokens = len(trees), max(map(len, trees))
    input_ids = torch.full((n_rows, n_tokens), pad_id)
    position_ids = torch.zeros(n_rows, n_tokens, dtype=torch.long)
    branch = torch.full((n_rows, n_tokens), -2)
    order = torch.arange(n_tokens)
    targets, owners, last = [], [], []
    for row, tree in enumerate(trees):
        n_prompt = len(tree.prompt)
        input_ids[row, :n_prompt] = torch.tensor(tree.prompt)
        position_ids[row, :n_prompt] = order[:n_prompt]
        branch[row, :n_prompt] = -1
        at = n_prompt
        for number, tokens in enumerate(tree.branches):
            end = at + len(tokens)
            input_ids[row, at:end] = torch.tensor(tokens)
            position_ids[row, at:end] = n_prompt + order[: len(tokens)]
            branch[row, at:end] = number
            predictors = [n_prompt - 1, *range(at, end - 1)]
            targets += [(row, where, token) for where, token in zip(predictors, tokens, strict=True)]
            owners += [len(last)] * len(tokens)
            last.append((row, end - 1))
            at = end
    earlier = order.view(-1, 1) >= order
    own = branch.unsqueeze(2) == branch.unsqueeze(1)
    in_prompt = (branch == -1).unsqueeze(1) & (branch != -2).unsqueeze(2)
    visible = (earlier & (own | in_prompt) & (branch != -2).unsqueeze(1)) | torch.eye(n_tokens, dtype=torch.bool)
    n_prompts = torch.tensor([len(tree.prompt) for tree in trees]).unsqueeze(1)
    return TreeBatch(
        input_ids,
        position_ids + n_prefix,
        visible,
        (order >= n_prompts - 1) & (branch != -2),
        torch.tensor(targets).T,
        torch.tensor(owners),
        torch.tensor(last).T,
    )


def additive_mask(batch: TreeBatch, n_prefix: int, dtype: torch.dtype) -> Float[Tensor, "rows 1 tokens seen"]:
    """The 4-D mask of a batch behind `n_prefix` cached tokens: 0 where visible, the dtype's minimum elsewhere."""
    rows, tokens = batch.input_ids.shape
    visible = torch.cat([batch.visible.new_ones(rows, tokens, n_prefix), batch.visible], dim=2)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
