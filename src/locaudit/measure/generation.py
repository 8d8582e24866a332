r"""What an edited model says: greedy answers, many questions and many edits in one batch.

transformers' own `generate` decodes. A batch is left-padded behind the prefix that all prompts share:

    cached          prefilled, then decoded one column at a time
    p p p p p | - - q q q | a a a ...
    p p p p p | q q q q q | a a a ...

The prefix runs once for each edit, and its keys and values serve every row. The last column of every forward is the
last prompt token or the newest answer token of every row, which is where an ``answer`` edit (ITI) acts.

Source: TruthfulQA's generation task and ITI's code. Deviation: rows stop at the next question's marker instead of
decoding on and cutting afterwards; the answers are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from locaudit.edits import EditBank
from locaudit.linears import fast_linears
from locaudit.measure.forward import Prefix, batches, check_length, run_prefix
from locaudit.models import Model

BATCH_TOKENS = {"cpu": 32768, "cuda": 65536}
"""Padded tokens of one batch, prefix and tokens to come included, over all edits: keys and values are kept for each."""
BATCH_ROWS = {"cpu": 128, "cuda": 512}
"""Rows of one batch, over all edits. Part of what a generation depends on below float32: rounding follows shapes."""
SEGMENT = 6
"""Tokens after which rows that are done leave the batch."""
_MARKER = re.compile(r"(?<!\w)Q:")
"""The next question: where an answer ends."""
_TAIL = 8
"""Newest tokens in which the marker is looked for after each step; it takes at most four."""


def generate_answers(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None = None,
    *,
    max_new_tokens: int = 50,
    cached_prefix: Prefix | None = None,
    batch_tokens: int | None = None,
) -> list[list[str]]:
    """Greedy answer to every prompt under each edit of the bank: texts [edit][prompt], stripped, without the marker.

    `prompts` are token ids behind `prefix`; `cached_prefix` is `run_prefix` of it under the same bank, if at hand;
    `batch_tokens` bounds a batch's padded tokens (None: `BATCH_TOKENS`).
    Raises `ModelError` when a prompt and its answer do not fit the model's context or sliding window.
    """
    tokens = generate_tokens(
        model,
        prefix,
        prompts,
        bank,
        max_new_tokens=max_new_tokens,
        cached_prefix=cached_prefix,
        batch_tokens=batch_tokens,
    )
    return [[answer_text(model, row) for row in rows] for rows in tokens]


def answer_text(model: Model, tokens: Sequence[int]) -> str:
    """Text of generated tokens up to the next question's marker, stripped, special tokens left out.

    A marker that the limit on tokens cut in two (a last line ``Q``) is dropped as well.
    """
    text = model.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return re.sub(r"\n\s*Q\s*$", "", _MARKER.split(text, maxsplit=1)[0]).strip()  # type: ignore[arg-type, union-attr]


def generate_tokens(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None = None,
    *,
    max_new_tokens: int = 50,
    cached_prefix: Prefix | None = None,
    batch_rows: int | None = None,
    batch_tokens: int | None = None,
) -> list[list[tuple[int, ...]]]:
    """Token ids [edit][prompt] of `generate_answers`, up to and with the token that ended the answer."""
    n_edits = bank.n_edits if bank else 1
    longest = len(prefix) + max(map(len, prompts)) + max_new_tokens
    check_length(model, longest, "a question with the answer to be generated (prompt included)")
    out: list[list[tuple[int, ...]]] = [[()] * len(prompts) for _ in range(n_edits)]
    ends = model.end_tokens
    kind = "cpu" if model.device.type == "cpu" else "cuda"
    batch_rows, batch_tokens = batch_rows or BATCH_ROWS[kind], batch_tokens or BATCH_TOKENS[kind]
    with torch.no_grad(), _plain_generation(model), fast_linears(model.lm):
        if cached_prefix is None:
            cached_prefix = run_prefix(model, prefix, bank)
        lengths = [len(prefix) + len(prompt) + max_new_tokens for prompt in prompts]
        for group in batches(lengths, max(batch_tokens // n_edits, 1)):
            size = max(batch_rows // n_edits, 1)
            for numbers in (group[i : i + size] for i in range(0, len(group), size)):
                chosen = [prompts[i] for i in numbers]
                rows = _decode(model, prefix, chosen, bank, cached_prefix, max_new_tokens, ends)
                for k in range(n_edits):
                    for i, row in zip(numbers, rows[k * len(numbers) : (k + 1) * len(numbers)], strict=True):
                        out[k][i] = row
    return out


def _decode(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None,
    cached: Prefix | None,
    max_new_tokens: int,
    ends: frozenset[int],
) -> list[tuple[int, ...]]:
    """New tokens of each row, edit-major. Rows that are done leave the batch every `SEGMENT` tokens."""
    n_edits = bank.n_edits if bank else 1
    n_rows, width = n_edits * len(prompts), max(map(len, prompts))
    ids = torch.full((n_rows, len(prefix) + width), model.pad_id)
    seen = torch.zeros_like(ids)
    ids[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.long)
    seen[:, : len(prefix)] = 1
    for row in range(n_rows):
        prompt = prompts[row % len(prompts)]
        ids[row, ids.shape[1] - len(prompt) :] = torch.tensor(prompt)
        seen[row, ids.shape[1] - len(prompt) :] = 1
    rows = torch.arange(n_edits, device=model.device).repeat_interleave(len(prompts))
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(cached or ()):
        cache.update(keys.index_select(0, rows.to(keys.device)), values.index_select(0, rows.to(values.device)), layer)
    ids, seen = ids.to(model.device), seen.to(model.device)
    n_prompt, out = ids.shape[1], [()] * n_rows
    going = torch.arange(n_rows, device=model.device)
    while len(going):
        n_done = ids.shape[1] - n_prompt
        with bank.decoding(model, rows[going]) if bank else nullcontext():
            ids = model.lm.generate(  # type: ignore[operator]
                ids,
                attention_mask=seen,
                past_key_values=cache,
                generation_config=GenerationConfig(
                    max_new_tokens=min(SEGMENT, max_new_tokens - n_done),
                    do_sample=False,
                    pad_token_id=model.pad_id,
                    eos_token_id=sorted(ends),
                ),
                stopping_criteria=StoppingCriteriaList([_NextQuestion(model, n_prompt)]),
            )
        last = ids.shape[1] - n_prompt >= max_new_tokens
        keep = []
        for place, row in enumerate(ids[:, n_prompt:].tolist()):
            end = _end(model, row, n_done, ends)
            if end is not None or last:
                out[int(going[place])] = tuple(row[:end])
            else:
                keep.append(place)
        chosen = torch.tensor(keep, dtype=torch.long, device=model.device)
        going, ids, seen = going[chosen], ids[chosen], seen[chosen]
        seen = torch.cat([seen, seen.new_ones(len(seen), ids.shape[1] - seen.shape[1])], dim=1)
        if keep:
            cache.batch_select_indices(chosen.cpu())  # layers may lie on several devices
    return out


class _NextQuestion(StoppingCriteria):
    """A row is done once its answer holds the marker of the next question."""

    def __init__(self, model: Model, n_prompt: int):
        self._model = model
        self._n_prompt = n_prompt

    def __call__(self, input_ids, scores, **_) -> Bool[Tensor, " rows"]:  # type: ignore[override]
        new = input_ids[:, self._n_prompt :]
        tails = self._model.tokenizer.batch_decode(new[:, -_TAIL:], skip_special_tokens=True)
        done = ["Q:" in tail and _asks(self._model, row.tolist()) for tail, row in zip(tails, new, strict=True)]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def _asks(model: Model, tokens: Sequence[int]) -> bool:
    """Whether the whole answer holds the marker: what stands before a ``Q:`` may lie outside its tail."""
    return _MARKER.search(model.tokenizer.decode(list(tokens), skip_special_tokens=True)) is not None  # type: ignore[arg-type]


def _end(model: Model, row: Sequence[int], start: int, ends: frozenset[int]) -> int | None:
    """Length of the answer with the token that ended it, looked for from `start` on; None if it has not ended."""
    for n in range(start + 1, len(row) + 1):
        if row[n - 1] in ends:
            return n
        tail = model.tokenizer.decode(list(row[max(n - _TAIL, 0) : n]), skip_special_tokens=True)
        if "Q:" in tail and _asks(model, row[:n]):
            return n
    return None


@contextmanager
def _plain_generation(model: Model) -> Iterator[None]:
    """Let the checkpoint's own generation settings (penalties, sampling) rest.

    transformers fills whatever a caller leaves open from them.
    """
    own = model.lm.generation_config
    model.lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.lm.generation_config = own
