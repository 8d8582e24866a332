r"""Generation under edits: greedy or sampled answers to many questions under many edits, in one batch.

transformers' own `generate` decodes. The prompts are left-padded, after the prefix that all of them share:

    KV cache          one forward     one token per forward
    p p p p p       | - - q q q     | a a a ...            edit 0, question 0
    p p p p p       | q q q q q     | a a a ...            edit 0, question 1
    p p p p p       | - - q q q     | a a a ...            edit 1, question 0
    p p p p p       | q q q q q     | a a a ...            edit 1, question 1

With K edits and N prompts a batch has K N rows, all prompts of edit 0 first. The prefix runs once per edit, and its KV
cache is copied to that edit's rows. In every forward, the last column holds the last prompt token or the newest answer
token of each row. An ``answer`` edit (ITI) acts there only; edits of prompt tokens act in the first forward only.

**Samples** at temperature 1 are drawn by the Gumbel-max trick: the next token is argmax over v of z_v + g_v, with
logits z and independent Gumbel noise g. Then P(v) = softmax(z)_v (Gumbel 1954; Maddison et al. 2014). The noise is a
function of the prompt, the number of the sample and the token's position alone. So all edits answer with the same
noise (common random numbers: differences between edits have less variance), and a batch of any shape gives the same
text.

Source: TruthfulQA's generation task and ITI's code. Deviation: in style ``qa`` a row stops at the next question's
marker ("Q:"), where the original decodes on and cuts the text afterwards; the answers are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from locaudit.behaviours.format import Prompt
from locaudit.edits import EditBank, roles_at
from locaudit.measure.forward import Prefix, batches, cache_of, check_length, run_prefix
from locaudit.models import CACHE, Model
from locaudit.models.memory import of_device

BATCH_TOKENS = {"cpu": 32768, "cuda": 65536}
"""Tokens in one batch over all edits, by device: they bound the KV cache. Counted are prefix, padding, prompt and the
answer's maximal length."""
BATCH_ROWS = {"cpu": 128, "cuda": 512}
"""Rows in one batch over all edits, by device. Below float32, answers can depend on it: rounding varies with shapes."""
SEGMENT = 6
"""After each segment of this many tokens, rows whose answer has ended are removed from the batch."""
POOL = 2**24
"""Gumbel values from which all noise is cut: 64 MiB. Drawing 49,152 new ones for each token would take far longer."""
_TAIL = 8
"""After each step, the next question's marker is looked for in this many of the newest tokens; it has at most four."""


def generate_answers(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None = None,
    *,
    answer_format: Prompt | None = None,
    **limits: Any,
) -> list[list[str]]:
    """Answers as text, ``[edit][prompt]``, cut where the next question begins.

    Takes the arguments of `generate_tokens`.
    """
    tokens = generate_tokens(model, prefix, prompts, bank, answer_format=answer_format, **limits)
    return [[answer_text(model, row, answer_format) for row in rows] for rows in tokens]


def answer_text(model: Model, tokens: Sequence[int], answer_format: Prompt | None = None) -> str:
    """Decode generated tokens without special tokens, and cut the text where the answer ends (`Prompt.answer`)."""
    return (answer_format or Prompt()).answer(_decoded(model, tokens))


def generate_tokens(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    bank: EditBank | None = None,
    *,
    samples: Sequence[int] | None = None,
    subjects: Sequence[int | None] | None = None,
    max_new_tokens: int = 50,
    answer_format: Prompt | None = None,
    cached_prefix: Prefix | None = None,
    batch_tokens: int | None = None,
) -> list[list[tuple[int, ...]]]:
    """Token ids of the answers, ``[edit][prompt]``, including the token that ended each answer.

    `samples` has the number of the sample to draw for each prompt; 0 stands for the greedy answer (None: all are
    greedy). A prompt that is to be answered several times is given several times. `prefix` holds the token ids that all
    prompts begin with, `prompts` the rest of each, and `subjects` the index in it of each subject's last token (None:
    there is none). `answer_format` tells where an answer ends (None: at ``Q:``). Pass `cached_prefix` if `run_prefix`
    of the prefix under the same bank was already computed. `batch_tokens` is the most padded tokens in a batch (None:
    `BATCH_TOKENS`). Raises `ModelError` if a prompt with its answer does not fit the model's context or sliding window.
    """
    n_edits = bank.n_edits if bank else 1
    longest = len(prefix) + max(map(len, prompts)) + max_new_tokens
    check_length(model, longest, "a question with the answer to be generated (prompt included)", len(prefix))
    out: list[list[tuple[int, ...]]] = [[()] * len(prompts) for _ in range(n_edits)]
    answer_format = answer_format or Prompt()
    ended = _Ended(model, answer_format, model.end_tokens | answer_format.end_tokens(model.tokenizer))
    batch_rows = of_device(BATCH_ROWS, model.device)
    batch_tokens = batch_tokens or of_device(BATCH_TOKENS, model.device)
    lengths = [len(prefix) + len(prompt) + max_new_tokens for prompt in prompts]
    groups = batches(lengths, max(batch_tokens // n_edits, 1), max(batch_rows // n_edits, 1))
    with torch.no_grad(), plain_generation(model), contiguous_head(model):
        if cached_prefix is None:
            cached_prefix = run_prefix(model, prefix, bank)
        for numbers in groups:
            chosen = [prompts[i] for i in numbers]
            drawn = [samples[i] if samples else 0 for i in numbers]
            marks = [subjects[i] if subjects else None for i in numbers]
            rows = _decode(model, prefix, chosen, drawn, marks, bank, cached_prefix, max_new_tokens, ended)
            for n, row in enumerate(rows):
                k, place = divmod(n, len(numbers))  # row n is prompt `place` of the batch under edit k
                out[k][numbers[place]] = row
    return out


def differing_answers(model: Model, prefix: Sequence[int], prompts: Sequence[Sequence[int]], **limits: Any) -> int:
    """How many greedy answers of the unedited model differ between one batch and one prompt at a time.

    None in float32. In 16 bits, rounding depends on the shape of a batch. Takes the arguments of `generate_tokens`.
    """
    batched = generate_tokens(model, prefix, prompts, **limits)[0]
    alone = [generate_tokens(model, prefix, [prompt], **limits)[0][0] for prompt in prompts]
    return sum(a != b for a, b in zip(batched, alone, strict=True))


@cache
def _pool(device: torch.device) -> Float[Tensor, " pool"]:
    """`POOL` independent Gumbel values, the same on every device."""
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=0)).random(POOL)).clamp_(min=2.0**-54)
    return uniform.log_().neg_().log_().neg_().float().to(device)


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


class _Gumbel(LogitsProcessor):
    """Adds noise to the logits of sampled rows, so that ``generate``, which takes the largest logit, samples.

    The noise of a token is a slice of the pool that begins at a hash of prompt, sample and position.
    """

    def __init__(self, rows: Sequence[int | None], n_prompt: int):
        """`rows` has the hash of prompt and sample of each row, None if it is greedy."""
        self._rows, self._n_prompt = rows, n_prompt

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows vocabulary"]) -> Tensor:
        position, n_tokens = input_ids.shape[1] - self._n_prompt, scores.shape[1]
        for logits, row in zip(scores, self._rows, strict=True):
            if row is not None:
                start = _hash(row, position) % (POOL - n_tokens)
                logits += _pool(scores.device)[start : start + n_tokens]
        return scores


@dataclass(frozen=True)
class _Ended:
    """Tells whether a generated answer has ended: at an end-of-text token or at the next question's marker."""

    model: Model
    answer_format: Prompt
    end_tokens: frozenset[int]

    def __call__(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.end_tokens:
            return True
        # The tail is a cheap first test. Whether its "Q:" really is a marker can depend on earlier text.
        marker = self.answer_format.marker
        in_tail = marker and marker in _decoded(self.model, tokens[-_TAIL:])
        return bool(in_tail) and self.answer_format.has_ended(_decoded(self.model, tokens))


def _decode(
    model: Model,
    prefix: Sequence[int],
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    subjects: Sequence[int | None],
    bank: EditBank | None,
    cached: Prefix | None,
    max_new_tokens: int,
    ended: _Ended,
) -> list[tuple[int, ...]]:
    """Generate one batch: the new tokens of each of its K N rows, all prompts of edit 0 first.

    `samples` has the number of each prompt's sample, 0 for a greedy answer.
    `generate` is called for `SEGMENT` tokens at a time. In between, rows whose answer has ended leave the batch.
    """
    n_edits = bank.n_edits if bank else 1
    n_rows, width = n_edits * len(prompts), max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    padded = [[*prefix, *[model.pad_id] * gap, *prompt] for gap, prompt in zip(gaps, prompts, strict=True)]
    visible = [[1] * len(prefix) + [0] * gap + [1] * (width - gap) for gap in gaps]
    # Both (K N, P + width); `seen` is 0 at padding.
    ids, seen = (torch.tensor(part * n_edits, device=model.device) for part in (padded, visible))
    rows = torch.arange(n_edits, device=model.device).repeat_interleave(len(prompts))  # (K N,): the edit of each row
    cache = cache_of(cached, rows) if cached else DynamicCache()
    n_prompt, out = ids.shape[1], [()] * n_rows
    drawn = [_hash([*prefix, *prompt], n) if n else None for prompt, n in zip(prompts, samples, strict=True)] * n_edits
    columns = [-1 if at is None else len(prefix) + gap + at for gap, at in zip(gaps, subjects, strict=True)]
    subject, last_prompt = (torch.tensor(x, device=model.device).view(-1, 1) for x in (columns * n_edits, n_prompt - 1))
    going = torch.arange(n_rows, device=model.device)  # numbers of the rows still in the batch

    @lru_cache(maxsize=1)  # every edited site of a forward asks for the same
    def roles(_n_rows: int, n_tokens: int, n_past: int) -> Int[Tensor, "rows tokens"]:
        return roles_at(torch.arange(n_past, n_past + n_tokens, device=ids.device), last_prompt, subject[going])

    def stop(input_ids: Tensor, _scores, **_) -> Bool[Tensor, " rows"]:
        done = [ended(row) for row in input_ids[:, n_prompt:].tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    while len(going):
        # With n of the K N rows left: ids (n, P + width + n_done), seen the same, cache with n rows.
        n_done = ids.shape[1] - n_prompt
        with bank.applied(model, rows[going], roles) if bank else nullcontext():
            ids = model.lm.generate(  # type: ignore[operator]
                ids,
                attention_mask=seen,
                generation_config=GenerationConfig(
                    max_new_tokens=min(SEGMENT, max_new_tokens - n_done),
                    do_sample=False,
                    pad_token_id=model.pad_id,
                    eos_token_id=sorted(ended.end_tokens),
                ),
                logits_processor=LogitsProcessorList([_Gumbel([drawn[n] for n in going.tolist()], n_prompt)]),
                stopping_criteria=StoppingCriteriaList([stop]),  # type: ignore[list-item],
                **{CACHE: cache},
            )
        last = ids.shape[1] - n_prompt >= max_new_tokens
        keep = []
        # `generate` goes on until all rows have ended: find where each row's answer first ended in this segment.
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
def plain_generation(model: Model) -> Iterator[None]:
    """Switch off the checkpoint's own generation settings, such as sampling and penalties.

    transformers would use them for every setting that the caller leaves open.
    """
    own = model.lm.generation_config
    model.lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.lm.generation_config = own


def contiguous_head(model: Model) -> AbstractContextManager:
    """Make the output head's input contiguous in memory, which is faster.

    In generation the head's input is the last token of each row, ``h[:, -1:]``, which is not contiguous. For such an
    input PyTorch computes a separate product for each row and copies the head's weights each time.
    """
    head = model.lm.get_output_embeddings()
    if head is None:
        return nullcontext()
    return head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
