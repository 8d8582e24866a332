"""Generated answers under several edits, with a cache so that no answer is generated twice."""

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
"""Part of every cache key: another version of this code or of transformers may generate other answers."""


def answer_prompts(
    model: Model,
    forest: Forest,
    edits: Sequence[Edit] | None,
    *,
    max_new_tokens: int,
    cache: Cache,
    samples: Sequence[int] = (0,),
    answer_format: Prompt | None = None,
    cached_prefix: Prefix | None = None,
    batch_tokens: int | None = None,
) -> list[tuple[tuple[str, ...], ...]]:
    """Answers to the forest's prompts, ``[edit][sample][question]``; of the unedited model if `edits` is None.

    `samples` are the numbers of the samples wanted; 0 is the greedy answer. Pass `cached_prefix` if `run_prefix` of the
    forest's prefix under all the edits was already computed. `batch_tokens` is the most padded tokens in a batch (None:
    `BATCH_TOKENS`). The other arguments are those of `generate_tokens`.

    An answer's cache key is a hash of the model, the edit, the prompt and its subject, the sample's number,
    `max_new_tokens` and the marker at which an answer ends. Edits that lack the same answers generate them together, as
    one bank. Below float32 an answer can depend on the rest of its batch, through rounding; the cache keeps the first
    one generated.
    """
    prompts = [(tree, sample) for sample in samples for tree in forest.trees]
    marks = [""] if edits is None else [hashlib.sha256(edit.to_bytes()).hexdigest() for edit in edits]
    said_until = (max_new_tokens, (answer_format or Prompt()).marker)
    addresses = [
        [content_hash([VERSION, model.fingerprint, mark, forest.prefix + tree.prompt, said_until, *([n] if n else []),
                       *([tree.mark] if tree.mark else [])], 32)
         for tree, n in prompts]
        for mark in marks
    ]  # fmt: skip
    found = cache.get([address for row in addresses for address in row])
    lacking: dict[tuple[int, ...], list[int]] = {}  # numbers in `prompts` without an answer -> edits that lack them
    for k, row in enumerate(addresses):
        numbers = tuple(i for i, address in enumerate(row) if address not in found)
        if numbers:
            lacking.setdefault(numbers, []).append(k)
    for numbers, group in lacking.items():
        bank = None if edits is None else stack(model, [edits[k] for k in group])
        texts = generate_answers(
            model,
            forest.prefix,
            [prompts[i][0].prompt for i in numbers],
            bank,
            samples=[prompts[i][1] for i in numbers],
            subjects=[prompts[i][0].subject for i in numbers],
            max_new_tokens=max_new_tokens,
            answer_format=answer_format,
            cached_prefix=cached_prefix if len(group) == len(marks) else None,
            batch_tokens=batch_tokens,
        )
        fresh = {addresses[k][i]: text for k, said in zip(group, texts, strict=True)
                 for i, text in zip(numbers, said, strict=True)}  # fmt: skip
        cache.put(fresh)
        found |= fresh
    n = len(forest.trees)
    return [
        tuple(tuple(found[address] for address in row[i * n : (i + 1) * n]) for i in range(len(samples)))
        for row in addresses
    ]
