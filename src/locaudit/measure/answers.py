"""Answers of a split's questions under several edits, none of them generated twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import transformers

from locaudit.behaviours.format import Prompt
from locaudit.edits import Edit, stack
from locaudit.measure.forward import Prefix
from locaudit.measure.generation import generate_answers
from locaudit.measure.tree import Forest
from locaudit.models import Model
from locaudit.records import content_hash
from locaudit.store.cache import Cache

VERSION = (3, transformers.__version__)
"""Part of every address: the same model, edit and prompt may give another answer under another one."""


def answer_prompts(
    model: Model,
    forest: Forest,
    edits: Sequence[Edit] | None,
    *,
    max_new_tokens: int,
    cache: Cache,
    answer_format: Prompt | None = None,
    cached_prefix: Prefix | None = None,
    batch_tokens: int | None = None,
) -> list[tuple[str, ...]]:
    """Greedy answers [edit][question] to the forest's prompts; of the unedited model alone when `edits` is None.

    `cached_prefix` is `run_prefix` of the forest's prefix under all of the edits, if at hand, `batch_tokens` the most
    padded tokens of one batch (None: `BATCH_TOKENS`).

    An answer's address is a hash of model, edit, prompt, limit and where an answer ends (`answer_format`). Edits that
    lack the same answers generate them together, as one bank. Below float32 an answer may depend on what it was batched
    with, through rounding: the first one found is kept.
    """
    prompts = [tree.prompt for tree in forest.trees]
    marks = [""] if edits is None else [hashlib.sha256(edit.to_bytes()).hexdigest() for edit in edits]
    said_until = (max_new_tokens, (answer_format or Prompt()).marker)
    addresses = [
        [content_hash([VERSION, model.fingerprint, mark, forest.prefix + prompt, said_until], 32)
         for prompt in prompts]
        for mark in marks
    ]  # fmt: skip
    found = cache.get([address for row in addresses for address in row])
    lacking: dict[tuple[int, ...], list[int]] = {}
    for k, row in enumerate(addresses):
        numbers = tuple(i for i, address in enumerate(row) if address not in found)
        if numbers:
            lacking.setdefault(numbers, []).append(k)
    for numbers, group in lacking.items():
        bank = None if edits is None else stack(model, [edits[k] for k in group])
        texts = generate_answers(
            model,
            forest.prefix,
            [prompts[i] for i in numbers],
            bank,
            max_new_tokens=max_new_tokens,
            answer_format=answer_format,
            cached_prefix=cached_prefix if len(group) == len(marks) else None,
            batch_tokens=batch_tokens,
        )
        fresh = {addresses[k][i]: text for k, said in zip(group, texts, strict=True)
                 for i, text in zip(numbers, said, strict=True)}  # fmt: skip
        cache.put(fresh)
        found |= fresh
    return [tuple(found[address] for address in row) for row in addresses]
