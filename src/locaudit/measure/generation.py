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

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

from locaudit.behaviours.format import Prompt
from locaudit.edits import EditBank
from locaudit.measure.forward import Prefix, batches, cache_of, check_length, run_prefix
from locaudit.models import CACHE, Model
from locaudit.models.memory import of_device

BATCH_TOKENS = {"cpu": 32768, "cuda": 65536}
"""Padded tokens of one batch, prefix and tokens to come included, over all edits: keys and values are kept for each."""
BATCH_ROWS = {"cpu": 128, "cuda": 512}
"""Rows of one batch, over all edits. Part of what a generation depends on below float32: rounding follows shapes."""
SEGMENT = 6
"""Tokens after which rows that are done leave the batch."""
_TAIL = 8
"""Newest tokens in which the next question's marker is looked for after each step; it takes at most four."""


def generate_answers(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None = None,
    *,
    answer_format: Prompt | None = None,
    **limits: Any,
) -> list[list[str]]:
    """Greedy answer to every prompt under each edit of the bank: texts [edit][prompt], without the next question.

    Arguments are those of `generate_tokens`.
    """
    tokens = generate_tokens(model, prefix, prompts, bank, answer_format=answer_format, **limits)
    return [[answer_text(model, row, answer_format) for row in rows] for rows in tokens]


def answer_text(model: Model, tokens: Sequence[int], answer_format: Prompt | None = None) -> str:
    """The answer in generated tokens (`Prompt.answer`), special tokens left out."""
    return (answer_format or Prompt()).answer(_decoded(model, tokens))


def generate_tokens(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None = None,
    *,
    max_new_tokens: int = 50,
    answer_format: Prompt | None = None,
    cached_prefix: Prefix | None = None,
    batch_tokens: int | None = None,
) -> list[list[tuple[int, ...]]]:
    """Token ids [edit][prompt] of greedy answers, up to and with the token that ended the answer.

    `prompts` are token ids behind `prefix`; `answer_format` says where an answer ends (None: at ``Q:``);
    `cached_prefix` is `run_prefix` of the prefix under the same bank, if at hand; `batch_tokens` bounds a batch's
    padded tokens (None: `BATCH_TOKENS`). Raises `ModelError` when a prompt and its answer do not fit the model's
    context or sliding window.
    """
    n_edits = bank.n_edits if bank else 1
    longest = len(prefix) + max(map(len, prompts)) + max_new_tokens
    check_length(model, longest, "a question with the answer to be generated (prompt included)")
    out: list[list[tuple[int, ...]]] = [[()] * len(prompts) for _ in range(n_edits)]
    ended = _Ended(model, answer_format or Prompt(), model.end_tokens)
    batch_rows = of_device(BATCH_ROWS, model.device)
    batch_tokens = batch_tokens or of_device(BATCH_TOKENS, model.device)
    lengths = [len(prefix) + len(prompt) + max_new_tokens for prompt in prompts]
    groups = batches(lengths, max(batch_tokens // n_edits, 1), max(batch_rows // n_edits, 1))
    with torch.no_grad(), _plain_generation(model), contiguous_head(model):
        if cached_prefix is None:
            cached_prefix = run_prefix(model, prefix, bank)
        for numbers in groups:
            chosen = [prompts[i] for i in numbers]
            rows = _decode(model, prefix, chosen, bank, cached_prefix, max_new_tokens, ended)
            for n, row in enumerate(rows):
                k, place = divmod(n, len(numbers))
                out[k][numbers[place]] = row
    return out


@dataclass(frozen=True)
class _Ended:
    """Whether a generated answer ends with its last token: an end token, or the next question's marker."""

    model: Model
    answer_format: Prompt
    end_tokens: frozenset[int]

    def __call__(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.end_tokens:
            return True
        # What stands before a marker, and tells whether it is one, may lie outside of the tail.
        in_tail = self.answer_format.marker in _decoded(self.model, tokens[-_TAIL:])
        return in_tail and self.answer_format.has_ended(_decoded(self.model, tokens))


def _decode(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None,
    cached: Prefix | None,
    max_new_tokens: int,
    ended: _Ended,
) -> list[tuple[int, ...]]:
    """New tokens of each row, edit-major. Rows that are done leave the batch every `SEGMENT` tokens."""
    n_edits = bank.n_edits if bank else 1
    n_rows, width = n_edits * len(prompts), max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    padded = [[*prefix, *[model.pad_id] * gap, *prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
    visible = [[1] * len(prefix) + [0] * gap + [1] * (width - gap) for gap in gaps]
    ids, seen = (torch.tensor(part * n_edits, device=model.device) for part in (padded, visible))  # (rows, tokens)
    rows = torch.arange(n_edits, device=model.device).repeat_interleave(len(prompts))
    cache = cache_of(cached, rows) if cached else DynamicCache()
    n_prompt, out = ids.shape[1], [()] * n_rows
    going = torch.arange(n_rows, device=model.device)

    def stop(input_ids: Tensor, _scores, **_) -> Bool[Tensor, " rows"]:
        done = [ended(row) for row in input_ids[:, n_prompt:].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    while len(going):
        n_done = ids.shape[1] - n_prompt
        with bank.decoding(model, rows[going]) if bank else nullcontext():
            ids = model.lm.generate(  # type: ignore[operator]
                ids,
                attention_mask=seen,
                generation_config=GenerationConfig(
                    max_new_tokens=min(SEGMENT, max_new_tokens - n_done),
                    do_sample=False,
                    pad_token_id=model.pad_id,
                    eos_token_id=sorted(ended.end_tokens),
                ),
                stopping_criteria=StoppingCriteriaList([stop]),  # type: ignore[list-item],
                **{CACHE: cache},
            )
        last = ids.shape[1] - n_prompt >= max_new_tokens
        keep = []
        for place, row in enumerate(ids[:, n_prompt:].tolist()):
            end = next((n for n in range(n_done + 1, len(row) + 1) if ended(row[:n])), None)
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


def _decoded(model: Model, tokens: Sequence[int]) -> str:
    return model.tokenizer.decode(list(tokens), skip_special_tokens=True)  # type: ignore[return-value]


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


def contiguous_head(model: Model) -> AbstractContextManager:
    """Let the output head take what lies in order.

    Of the last column of a batch, whose rows do not, PyTorch makes one product a row, each with a copy of the weights.
    """
    head = model.lm.get_output_embeddings()
    if head is None:
        return nullcontext()
    return head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
